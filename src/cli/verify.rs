//! `gptq verify`.

use std::fmt::Write;

use anyhow::Result;
use gptq::{
    checkpoint::Checkpoint,
    verify::{self, Verification},
};

use super::{
    args::{OutputArgs, VerifyArgs},
    terminal::{self, Terminal},
};

/// Findings shown; a broken file can have thousands.
const SHOWN: usize = 20;

pub(super) fn run(args: &VerifyArgs, output: &OutputArgs) -> Result<bool> {
    let against = args.against.as_ref().map(|dir| Checkpoint::open(dir)).transpose()?;
    let terminal = Terminal::new(output);
    let verification = verify::verify(&args.dir, against.as_ref(), &terminal)?;
    drop(terminal);
    if output.json {
        terminal::json(&verification)?;
    } else {
        terminal::result(&text(&verification, output.verbose))?;
    }
    Ok(verification.passed())
}

fn text(verification: &Verification, verbose: bool) -> String {
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
    for reader in &verification.readers {
        let verdict = reader.refused.as_deref().map_or_else(|| "yes".to_owned(), |why| format!("no: {why}"));
        let _ = writeln!(text, "{:<36} {verdict}", reader.name);
    }
    if !verification.checksums {
        text.push_str("no checksums in this folder: a flipped bit that leaves a valid code cannot be seen\n");
    }
    let _ = match verification.findings.len() {
        0 => writeln!(text, "ok: {} tensors", verification.tensors),
        1 => writeln!(text, "failed: 1 finding"),
        count => writeln!(text, "failed: {count} findings"),
    };
    text
}
