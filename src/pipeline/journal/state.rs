//! The one file that says how far a run is: its first line holds the checksum of the rest.

use std::{collections::BTreeMap, fs, ops::Range, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{super::window_file::WindowFile, identity::Identity};
use crate::{
    checkpoint::write_file_atomically,
    error::{Error, Result},
    report::{
        BranchReport, ComputeReport, LayerExchange, LayersComputed, PhaseReport, StageMemory, StageSeconds,
    },
    units::hex,
};

/// The file's name.
pub(super) const STATE_FILE: &str = "state.json";
/// Its beginning. The number rises when a reader of older states could misread a newer one.
const MAGIC: &str = "gptq-journal/3 ";

/// Progress of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::pipeline) struct State {
    /// The outputs and their inputs.
    pub(super) identity: Identity,
    /// Layers finished.
    pub(super) layers: usize,
    /// Layers of the model.
    pub(super) total_layers: usize,
    /// Hidden states behind the last finished layer, of each stream; none before the first and after the last.
    pub(super) hidden: Option<Vec<HiddenFile>>,
    /// Output Hessians, once gradients of some windows are summed; none where they are not used.
    pub(super) gradients: Option<GradientSums>,
    /// The branches as far as they are, in the plan's order; empty before the first layer is finished.
    pub(in crate::pipeline) branches: Vec<BranchState>,
    /// Warnings of the finished layers.
    pub(in crate::pipeline) warnings: Vec<String>,
    /// Each finished layer.
    pub(in crate::pipeline) layer_seconds: Vec<f64>,
    /// What ranks exchanged in the layers that several of them finished.
    #[serde(default)]
    pub(in crate::pipeline) exchanges: Vec<LayerExchange>,
    /// Seconds of each phase in the finished layers, and of sealing. `calibrating` is computed from the others.
    pub(super) stage_seconds: StageSeconds,
    /// Time and arithmetic of the finished layers by phase.
    #[serde(default)]
    pub(in crate::pipeline) phases: Vec<PhaseReport>,
    /// Largest resident memory in each phase.
    pub(in crate::pipeline) stage_memory: StageMemory,
    /// Seconds of all parts of the run, interrupted layers included.
    pub(in crate::pipeline) seconds: f64,
    /// Of these, the seconds of writing this journal.
    pub(in crate::pipeline) journal_seconds: f64,
    /// Largest resident memory of all parts of the run, bytes.
    pub(in crate::pipeline) peak_memory_bytes: Option<u64>,
    /// Device and data type of the finished layers, by part of the run.
    pub(super) parts: Vec<LayersComputed>,
    /// Whether all branches are written and checked, and need only be moved to their places.
    pub(in crate::pipeline) sealed: bool,
}

/// Hidden states of a stream on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct HiddenFile {
    /// `bf16`.
    pub(super) dtype: String,
    /// Bytes of a window.
    pub(super) window_bytes: usize,
    pub(super) file: CheckedFile,
}

/// Output Hessians of all layers: sums over some calibration windows, means once these are all windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct GradientSums {
    /// Windows in the sums, from the first one on.
    pub(super) windows: usize,
    /// Windows that gradients are taken on.
    pub(super) total_windows: usize,
    /// Bytes of one layer's output Hessians.
    pub(super) layer_bytes: usize,
    /// A layer in the place of each window.
    pub(super) file: CheckedFile,
}

/// A file of windows in the journal's folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct CheckedFile {
    /// Name in the journal's folder.
    pub(super) name: String,
    /// XXH3-128 of each window, hexadecimal.
    pub(super) checksums: Vec<String>,
}

impl CheckedFile {
    /// Syncs `file`, which is complete, to the disk.
    pub(super) fn of(file: &WindowFile) -> Result<Self> {
        file.sync()?;
        let name = file.path().file_name().expect("it was made with a name");
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            checksums: file.checksums()?.iter().map(|sum| format!("{sum:032x}")).collect(),
        })
    }

    /// Opens the file in a journal's folder, to use some of its windows.
    ///
    /// # Errors
    /// When it is not what was written.
    pub(super) fn open(
        &self,
        folder: &Path,
        window_bytes: usize,
        windows: Range<usize>,
    ) -> Result<WindowFile> {
        let sums = self.checksums.iter().map(|sum| u128::from_str_radix(sum, 16));
        let sums = sums.collect::<std::result::Result<Vec<_>, _>>();
        let problem = || format!("it holds a checksum of `{}` that is no number", self.name);
        let sums = sums.map_err(|_| Error::journal(folder, problem()))?;
        WindowFile::open(folder.join(&self.name), &sums, window_bytes, windows)
    }
}

/// One branch so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::pipeline) struct BranchState {
    /// Its report so far.
    pub(in crate::pipeline) report: BranchReport,
    /// SHA-256 of each tensor that is written, hexadecimal.
    pub(in crate::pipeline) tensors: BTreeMap<String, String>,
}

impl State {
    /// Reads the state in a journal's folder; none if there is no such file.
    ///
    /// # Errors
    /// When it is not what was written.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(STATE_FILE);
        let bytes = match fs::read(&path) {
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(Error::io("read", &path))?,
        };
        let broken = |problem: &str| Error::journal(&path, problem);
        let text = String::from_utf8(bytes).map_err(|_| broken("it is not what was written (not UTF-8)"))?;
        let (first, rest) = text.split_once('\n').ok_or_else(|| broken("it is cut off"))?;
        let checksum = first
            .strip_prefix(MAGIC)
            .ok_or_else(|| broken("it was written by another version, or is no journal of gptq"))?;
        if checksum != sha256(rest) {
            return Err(broken("it is not what was written (checksum)"));
        }
        let state =
            serde_json::from_str(rest).map_err(|source| Error::Json { path: path.clone(), source })?;
        Ok(Some(state))
    }

    /// Replaces the state in a journal's folder, at once and durably.
    ///
    /// # Errors
    /// When it cannot be written; the old one then stands.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(STATE_FILE);
        let text =
            serde_json::to_string(self).map_err(|source| Error::Json { path: path.clone(), source })?;
        write_file_atomically(&path, format!("{MAGIC}{}\n{text}", sha256(&text)).as_bytes())
    }

    /// Whether it holds work that is lost if it is discarded.
    pub(super) fn holds_work(&self) -> bool {
        self.layers > 0 || self.gradients.is_some()
    }

    /// The reports of the branches, in the plan's order.
    pub(in crate::pipeline) fn reports(&self) -> Vec<BranchReport> {
        self.branches.iter().map(|branch| branch.report.clone()).collect()
    }

    /// Seconds of each phase of the run.
    pub(in crate::pipeline) fn stage_seconds(&self) -> StageSeconds {
        let StageSeconds { solving, packing, .. } = self.stage_seconds;
        let layers: f64 = self.layer_seconds.iter().sum();
        StageSeconds { calibrating: (layers - solving - packing).max(0.0), ..self.stage_seconds }
    }

    /// Device and data type of the layers, by part of the run; empty if there was no interruption.
    pub(in crate::pipeline) fn interrupted(&self) -> &[LayersComputed] {
        if self.parts.len() > 1 { &self.parts } else { &[] }
    }

    /// Device and data type of the last layers.
    pub(in crate::pipeline) fn compute(&self) -> &ComputeReport {
        &self.parts.last().expect("a layer is finished").compute
    }
}

pub(super) fn sha256(text: &str) -> String {
    hex(&Sha256::digest(text))
}
