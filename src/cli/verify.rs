//! `gptq verify`.

use std::{fmt::Write, path::Path};

use anyhow::{Result, bail};
use gptq::{
    calibration::Corpus,
    checkpoint::Checkpoint,
    verify::{self, KernelOptions, ScaleSigns, Verification},
};
use tch::Device;

use super::{
    args::{OutputArgs, VerifyArgs},
    compute, datasets, demo,
    hub::{self, Model},
    terminal::{self, Terminal},
};

/// Findings printed; a broken file can have thousands.
const SHOWN: usize = 20;

pub(super) fn run(args: &VerifyArgs, output: &OutputArgs) -> Result<bool> {
    let models = hub::models(&args.dir, output)?;
    let against = args.against.as_ref().map(|dir| hub::model(dir, output)).transpose()?;
    let against = against.map(|model| Checkpoint::open(&model.folder)).transpose()?;
    if args.device.is_none() && args.dataset.is_some() {
        bail!("--dataset is the text for --device, which is not given");
    }
    let tokenizer = models.first().map_or(args.dir.as_path(), |model| &model.folder);
    let kernel = args.device.as_ref().map(|device| kernel(args, device, tokenizer, output)).transpose()?;
    let options = kernel.as_ref().map(|(device, corpus)| {
        let (device, dtype) = (*device, args.compute_dtype);
        KernelOptions { device, dtype, corpus }
    });
    let terminal = Terminal::new(output);
    let verify = |model: &Model| {
        let verification = verify::verify(&model.folder, against.as_ref(), options.as_ref(), &terminal)?;
        Ok((model.label(), verification))
    };
    let found = models.iter().map(verify).collect::<gptq::Result<Vec<_>>>()?;
    drop(terminal);
    terminal::answer_each(output, &found, |verification| text(verification, output))?;
    Ok(found.iter().all(|(_, verification)| verification.passed()))
}

/// Device and text for a run of the linears.
fn kernel(args: &VerifyArgs, device: &str, model: &Path, output: &OutputArgs) -> Result<(Device, Corpus)> {
    let device = compute::device(device, output)?;
    let corpus = match &args.dataset {
        Some(name) => {
            let source = datasets::resolve(name, &datasets::options(&args.places), output)?;
            datasets::load(&source, model)?
        }
        None => demo::calibration_text()?,
    };
    Ok((device, corpus))
}

fn text(verification: &Verification, output: &OutputArgs) -> String {
    let verbose = output.verbose;
    let mut text = String::new();
    for finding in verification.findings.iter().take(SHOWN) {
        let _ = writeln!(text, "{}: {}", finding.subject, finding.problem);
    }
    if let Some(more) = verification.findings.len().checked_sub(SHOWN).filter(|&more| more > 0) {
        let _ = writeln!(text, "… and {more} more");
    }
    let distances = &verification.distances;
    if verbose {
        for distance in distances {
            let _ = writeln!(text, "{:<44} {:.5}", distance.name, distance.relative_error);
        }
    }
    if let Some(worst) = distances.iter().max_by(|a, b| a.relative_error.total_cmp(&b.relative_error)) {
        let mean = distances.iter().map(|d| d.relative_error).sum::<f64>() / distances.len() as f64;
        let _ = writeln!(
            text,
            "distance from the source ‖W−Ŵ‖/‖W‖: mean {mean:.4} over {} linears, largest {:.4} ({})",
            distances.len(),
            worst.relative_error,
            worst.name
        );
    }
    if let Some(kernel) = &verification.kernel {
        if verbose {
            for linear in &kernel.linears {
                let _ = writeln!(
                    text,
                    "{:<44} matmul {:.2e}, {:.3} of what rounding explains",
                    linear.name, linear.relative_error, linear.rounding
                );
            }
        }
        if let Some(worst) = kernel.worst() {
            let _ = writeln!(
                text,
                "int4 matmul in {} against fp64, {} tokens: at most {:.3} of what rounding explains over {} linears \
                 ({} with {} tokens, relative error {:.2e})",
                kernel.computed,
                kernel.tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join("/"),
                worst.rounding,
                kernel.linears.len(),
                worst.name,
                worst.tokens,
                worst.relative_error
            );
        }
    }
    let ScaleSigns { negative, all } = verification.scales;
    if negative > 0 {
        let _ = writeln!(
            text,
            "{negative} of {all} scales are negative; readers multiply by them as by any other"
        );
    }
    for reader in verification.readers.iter().filter(|_| !output.quiet) {
        let _ = writeln!(text, "{:<36} {}", reader.name, reader.verdict(&verification.tensor_parallel));
    }
    for note in &verification.notes {
        let _ = writeln!(text, "{note}");
    }
    // Nothing was read of a folder that cannot be opened.
    if !verification.checksums && verification.tensors > 0 {
        text.push_str("no checksums in this folder: a flipped bit that leaves a valid code cannot be seen\n");
    }
    let _ = match verification.findings.len() {
        0 => writeln!(text, "ok: {} tensors", verification.tensors),
        1 => writeln!(text, "failed: 1 finding"),
        count => writeln!(text, "failed: {count} findings"),
    };
    text
}
