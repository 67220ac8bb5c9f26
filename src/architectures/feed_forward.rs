//! The feed-forward block of a layer.

use super::LinearConfig;

/// The nonlinearity of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`.
    Gelu,
    /// The same with tanh in the place of the error function.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// Its square.
    ReluSquared,
}

impl Activation {
    /// The activation with a name of configs.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => Self::GeluTanh,
            "relu" => Self::Relu,
            "relu2" => Self::ReluSquared,
            _ => return None,
        })
    }
}

/// `down(act(gate(x)) · up(x))`, or `down(act(up(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedForwardConfig {
    /// The linears that read the block's input: gate and up, one with their rows one after another, or up alone.
    pub inputs: Vec<LinearConfig>,
    /// The last linear.
    pub down: LinearConfig,
    /// Whether there is a gate.
    pub gated: bool,
    /// Of the gate, else of up.
    pub activation: Activation,
}

impl FeedForwardConfig {
    /// Width inside the block.
    pub fn width(&self) -> usize {
        self.down.shape[1]
    }

    /// The same linears below another path: `mlp.gate_proj` becomes `mlp.experts.3.gate_proj` below `mlp.experts.3`.
    #[must_use]
    pub fn below(&self, path: &str) -> Self {
        let moved = |linear: &LinearConfig| {
            let name = linear.path.rsplit('.').next().unwrap_or_default();
            LinearConfig { path: format!("{path}.{name}").into(), ..linear.clone() }
        };
        Self { inputs: self.inputs.iter().map(moved).collect(), down: moved(&self.down), ..self.clone() }
    }
}

/// The choice of each token's experts: those with the largest softmax of the router's outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutingConfig {
    /// Tensor with the router's weight, `[experts, hidden]`.
    pub router: &'static str,
    /// Experts of the layer; the first blocks.
    pub experts: usize,
    /// Experts of a token.
    pub per_token: usize,
    /// Whether their weights are divided by their sum.
    pub renormalized: bool,
    /// Tensor with the gate of the shared block, which all tokens use, `[1, hidden]`; that block is the last.
    pub shared_gate: Option<&'static str>,
}

/// The feed-forward part of a layer: one block, or experts.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedForward {
    /// One block, or the experts and then the shared block, if there is one.
    pub blocks: Vec<FeedForwardConfig>,
    /// The routing, if there are experts.
    pub routing: Option<RoutingConfig>,
}

impl From<FeedForwardConfig> for FeedForward {
    fn from(block: FeedForwardConfig) -> Self {
        Self { blocks: vec![block], routing: None }
    }
}

impl FeedForward {
    /// Widths of the values that each token stores between the blocks' first and last linears: of all its experts together, and
    /// of the shared block.
    pub fn stored_widths(&self) -> Vec<usize> {
        let Some(routing) = &self.routing else { return vec![self.blocks[0].width()] };
        let shared = self.blocks.get(routing.experts).map(FeedForwardConfig::width);
        std::iter::once(routing.per_token * self.blocks[0].width()).chain(shared).collect()
    }

    /// Tensors beside the linears, with their shapes.
    pub fn dense_tensors(&self, hidden: usize) -> Vec<(String, Vec<usize>)> {
        let Some(routing) = &self.routing else { return Vec::new() };
        let gate = routing.shared_gate.map(|gate| (gate.to_owned(), vec![1, hidden]));
        std::iter::once((routing.router.to_owned(), vec![routing.experts, hidden])).chain(gate).collect()
    }
}
