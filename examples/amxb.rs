#![allow(missing_docs, warnings)]
use gptq::amx::*;
use std::time::Instant;
fn main() {
    for (parts, name) in [(Parts::One, "one"), (Parts::Two, "two")] {
        for depth in [64usize, 256, 512, 2048] {
            let mut l = Operand::zeros(depth, 256, parts);
            let mut r = Operand::zeros(depth, 256, parts);
            let _ = (l.lines_mut().len(), r.lines_mut().len());
            let mut c: Vec<Line> = vec![bytemuck::Zeroable::zeroed(); 256 * 256 / 16];
            let c: &mut [f32] = bytemuck::cast_slice_mut(&mut c);
            let n = (200_000_000_0 / (depth * 256 * 256)).max(1);
            let t = Instant::now();
            for _ in 0..n {
                for j in 0..8 {
                    for i in 0..8 {
                        multiply_add(l.strip(i), r.strip(j), parts, &mut c[i * 32 * 256 + j * 32..], 256);
                    }
                }
            }
            let s = t.elapsed().as_secs_f64();
            println!(
                "{name} depth {depth}: {:.0} GFLOP/s raw, one core",
                2.0 * n as f64 * (depth * 256 * 256) as f64 * (if name == "two" { 3.0 } else { 1.0 })
                    / s
                    / 1e9
            );
            let mut c2: Vec<Line> = vec![bytemuck::Zeroable::zeroed(); 256 * 256 / 16];
            let c2: &mut [f32] = bytemuck::cast_slice_mut(&mut c2);
            let t = Instant::now();
            for _ in 0..n {
                for j in 0..8 {
                    for i in 0..8 {
                        multiply_add(l.strip(i), r.strip(j), parts, &mut c2[(j * 8 + i) * 1024..], 32);
                    }
                }
            }
            let s = t.elapsed().as_secs_f64();
            println!(
                "   contiguous c {:.0}",
                2.0 * n as f64 * (depth * 256 * 256) as f64 * (if name == "two" { 3.0 } else { 1.0 })
                    / s
                    / 1e9
            );
        }
    }
}
