//! The activation of a feed-forward block, and the routing of tokens to experts.

use tch::{Kind, TchError, Tensor};

use crate::{
    architectures::{Activation, FeedForwardConfig, RoutingConfig},
    error::{Result, TorchContext},
};

/// Outputs of a block's first linears → inputs of its last linear.
pub(super) fn activated(config: &FeedForwardConfig, outputs: &[Tensor]) -> Result<Tensor> {
    let compute = || -> Result<Tensor, TchError> {
        let width = config.width() as i64;
        match (outputs, config.gated) {
            ([gate, up], true) => activation(config.activation, gate)?.f_mul(up),
            ([fused], true) => {
                let gate = fused.f_narrow(-1, 0, width)?;
                activation(config.activation, &gate)?.f_mul(&fused.f_narrow(-1, width, width)?)
            }
            ([up], false) => activation(config.activation, up),
            _ => unreachable!("a block has a gate and up, one linear of both, or up alone"),
        }
    };
    compute().torch("compute a feed-forward block's activation")
}

fn activation(activation: Activation, x: &Tensor) -> Result<Tensor, TchError> {
    match activation {
        Activation::Silu => x.f_silu(),
        Activation::Gelu => x.f_gelu("none"),
        Activation::GeluTanh => x.f_gelu("tanh"),
        Activation::Relu => x.f_relu(),
        Activation::ReluSquared => x.f_relu()?.f_square(),
    }
}

/// The experts of each of `T` tokens.
pub(super) struct Routing {
    /// `[T, k]`, the chosen experts.
    experts: Tensor,
    /// `[T·k]` fp32, the factors of their outputs.
    pub(super) weights: Tensor,
    /// Choices of each expert: positions in the flattened `[T·k]`.
    pub(super) chosen: Vec<Tensor>,
}

impl Routing {
    /// Routes tokens `x` `[T, hidden]` by the router's weight `[experts, hidden]`.
    pub(super) fn new(config: &RoutingConfig, router: &Tensor, x: &Tensor) -> Result<Self> {
        let route = || -> Result<Self, TchError> {
            let logits = x.f_linear(&router.f_to_kind(x.kind())?, None::<&Tensor>)?;
            let all = logits.f_softmax(-1, Kind::Float)?;
            let (mut weights, experts) = all.f_topk(config.per_token as i64, -1, true, true)?;
            if config.renormalized {
                weights = weights.f_div(&weights.f_sum_dim_intlist(-1, true, Kind::Float)?)?;
            }
            let flat = experts.f_flatten(0, 1)?;
            let chosen = |expert: usize| flat.f_eq(expert as i64)?.f_nonzero()?.f_flatten(0, 1);
            let chosen = (0..config.experts).map(chosen).collect::<Result<_, TchError>>()?;
            Ok(Self { experts, weights: weights.f_flatten(0, 1)?, chosen })
        };
        route().torch("route tokens to experts")
    }

    /// Position `[T·k]` in this routing of each choice of the routing `of`. A choice is an expert for a token; −1 marks one that this
    /// routing does not have.
    pub(super) fn matching(&self, of: &Self) -> Result<Tensor> {
        let find = || -> Result<Tensor, TchError> {
            let size = self.experts.size();
            let (tokens, k) = (size[0], size[1]);
            // `[T, k of the other, k]`.
            let same = of.experts.f_unsqueeze(2)?.f_eq_tensor(&self.experts.f_unsqueeze(1)?)?;
            let (found, place) = same.f_to_kind(Kind::Float)?.f_max_dim(2, false)?;
            let row = Tensor::f_arange(tokens, (Kind::Int64, self.experts.device()))?.f_unsqueeze(1)?;
            let place = place.f_add(&row.f_mul_scalar(k)?)?;
            place.f_masked_fill(&found.f_eq(0.0)?, -1)?.f_flatten(0, 1)
        };
        find().torch("match the experts of two models")
    }

    /// Chosen experts of each token.
    pub(super) fn per_token(&self) -> i64 {
        self.experts.size()[1]
    }
}
