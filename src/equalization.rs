//! Cross-layer equalization (Nagel et al., arXiv 1906.04721) of norms with the linears that read them. If a channel's norm
//! weight is much larger than the others and the weights that read it are smaller by about the same factor, or the reverse,
//! both are moved nearer to their medians. The model computes the same, and groups have weights of similar sizes.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::Checkpoint,
    error::{Result, TorchContext},
};

/// Ratio of a channel's norm and weights to their medians, in opposite directions, from which on the channel is changed.
const OUTLIER: f32 = 4.0;

/// Changes of a model's channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Equalization {
    /// By tensor, a power of two for each channel, which is the last axis. Weights that read a norm's output have the inverse
    /// of the norm's factors.
    factors: BTreeMap<String, Vec<f32>>,
    /// Changed channels of all norms.
    channels: usize,
    /// Norms with changed channels.
    norms: usize,
}

impl Equalization {
    /// Finds the changes from the norms, and from the weights that read norms with outliers. `step` is called once a layer.
    ///
    /// # Errors
    /// When a tensor is missing, malformed or not finite, and the errors of `step`.
    pub fn of(checkpoint: &Checkpoint, step: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let mut found = Self::default();
        let config = checkpoint.config();
        if let Some(reason) = config.equalization_refusal() {
            return Err(config.refused("equalize", &reason));
        }
        for (layer, parts) in config.layers.iter().enumerate() {
            step()?;
            for (norm, linears, others) in parts.norm_readers() {
                let linears = linears.map(|position| {
                    (config.linear_id(layer, position).weight(), parts.linears[position].shape.to_vec())
                });
                let dense = parts.feed_forward.dense_tensors(config.hidden_size).into_iter();
                let others = dense.filter(|(path, _)| others.contains(&path.as_str()));
                let others = others.map(|(path, shape)| (config.layer_tensor(layer, &path), shape));
                let readers: Vec<_> = linears.chain(others).collect();
                found.add_norm(checkpoint, config.layer_tensor(layer, &norm.weight()), &readers)?;
            }
        }
        Ok(found)
    }

    fn add_norm(
        &mut self,
        checkpoint: &Checkpoint,
        norm: String,
        readers: &[(String, Vec<usize>)],
    ) -> Result<()> {
        let config = checkpoint.config();
        let load = |name: &str, shape: &[usize]| checkpoint.load(name, shape, Kind::Float, Device::Cpu);
        let sizes = load(&norm, &[config.hidden_size])?.f_abs().torch("look at a norm")?;
        let sizes = Vec::<f32>::try_from(sizes).torch("look at a norm")?;
        let middle = median(&sizes);
        let strays = |&size: &f32| size > OUTLIER * middle || size * OUTLIER < middle;
        if middle == 0.0 || !sizes.iter().any(strays) {
            return Ok(());
        }
        let mut squares = Tensor::f_zeros([config.hidden_size as i64], (Kind::Float, Device::Cpu))
            .torch("look at weights")?;
        for (name, shape) in readers {
            let weight = load(name, shape)?;
            let sum = weight.f_square().and_then(|w| w.f_sum_dim_intlist(0, false, Kind::Float));
            squares = sum.and_then(|sum| squares.f_add(&sum)).torch("look at weights")?;
            checkpoint.release([name]);
        }
        let columns = squares.f_sqrt().and_then(Vec::<f32>::try_from);
        let factors = factors(&sizes, &columns.torch("look at weights")?);
        let channels = factors.iter().filter(|&&factor| factor != 1.0).count();
        if channels > 0 {
            self.channels += channels;
            self.norms += 1;
            let inverse: Vec<f32> = factors.iter().map(|factor| factor.recip()).collect();
            self.factors.extend(readers.iter().map(|(name, _)| (name.clone(), inverse.clone())));
            self.factors.insert(norm, factors);
        }
        Ok(())
    }

    /// The changed model; `None` if no channel changes.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn apply(&self, checkpoint: &Checkpoint) -> Result<Option<Checkpoint>> {
        match self.factors.is_empty() {
            true => Ok(None),
            false => checkpoint.scaled(self.factors.clone()).map(Some),
        }
    }

    /// Number of changed channels, and of norms that have some.
    pub fn channels(&self) -> (usize, usize) {
        (self.channels, self.norms)
    }
}

/// The factors of a norm's channels, from the magnitudes of its weights and of the columns that read it. Both move nearer to
/// their medians, but not beyond. Factors are powers of two, so that nothing is rounded.
fn factors(norm: &[f32], columns: &[f32]) -> Vec<f32> {
    let middle = [median(norm), median(columns)];
    let factor = |(&size, &column): (&f32, &f32)| {
        let (above, below) = (size / middle[0], middle[1] / column);
        if above >= OUTLIER && below >= OUTLIER && below.is_finite() {
            (-above.min(below).log2().floor()).exp2()
        } else if above > 0.0 && above * OUTLIER <= 1.0 && below * OUTLIER <= 1.0 {
            (-above.max(below).log2().ceil()).exp2()
        } else {
            1.0
        }
    };
    norm.iter().zip(columns).map(factor).collect()
}

fn median(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    let middle = sorted.len() / 2;
    *sorted.select_nth_unstable_by(middle, f32::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_channels_that_stray_in_opposite_directions_are_touched() {
        // Large and small, small and large, both large, large and not small, zeros.
        let norm = [1.0, 50.0, 0.01, 50.0, 50.0, 0.0, 50.0, 1.0, 1.0, 1.0, 1.0, 1.1, 0.9];
        let columns = [2.0, 0.1, 64.0, 90.0, 2.0, 64.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0];
        let found = factors(&norm, &columns);
        assert_eq!(found[..7], [1.0, 1.0 / 16.0, 32.0, 1.0, 1.0, 1.0, 1.0]);
        assert!(found[7..].iter().all(|&factor| factor == 1.0));
    }
}
