//! Shapes of linears that tensor parallelism splits over several GPUs, as vLLM and SGLang do it: linears that write to the residual
//! stream along their input features, all others along their output features, attention's projections by whole heads.

use crate::architectures::LayerConfig;

/// Numbers of parts that are looked at.
pub(super) const PARTS: [usize; 4] = [1, 2, 4, 8];

/// `[N, K]` of one part of a layer's linear; an error with what cannot be divided. Where there are more parts than key and value
/// heads, each part has one head, and several parts the same one.
pub(super) fn part(layer: &LayerConfig, position: usize, parts: usize) -> Result<[usize; 2], String> {
    let linear = &layer.linears[position];
    let [n, k] = linear.shape;
    let divided = |size: usize, what: &str| match size.is_multiple_of(parts) {
        true => Ok(size / parts),
        false => Err(format!("{} has {what} = {size}", linear.path)),
    };
    if layer.writes_to_stream(position) {
        return Ok([n, divided(k, "K")?]);
    }
    if !layer.projections().contains(&position) {
        return Ok([divided(n, "N")?, k]);
    }
    let attention = &layer.attention;
    let (heads, kv_heads) = (attention.num_heads, attention.num_kv_heads);
    if !heads.is_multiple_of(parts) {
        return Err(format!("attention has {heads} query heads"));
    }
    let kv_part = match (kv_heads.is_multiple_of(parts), parts.is_multiple_of(kv_heads)) {
        (true, _) => kv_heads / parts,
        (_, true) => 1,
        _ => return Err(format!("attention has {kv_heads} key and value heads")),
    };
    let (q, kv) = (heads / parts * attention.head_dim, kv_part * attention.head_dim);
    let rows = match (attention.fused(), position) {
        (true, _) => q + 2 * kv,
        (false, 0) => q,
        (false, _) => kv,
    };
    Ok([rows, k])
}
