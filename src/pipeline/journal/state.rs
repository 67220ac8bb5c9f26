//! The one file that says how far a run is: its first line holds the checksum of the rest.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::identity::Identity;
use crate::{
    checkpoint::write_file_atomically,
    error::{Error, Result},
    report::{BranchReport, ComputeReport, LayersComputed, StageMemory, StageSeconds},
};

/// The file's name.
pub(super) const STATE_FILE: &str = "state.json";
/// How it begins; the number goes up when a reader of older ones could misread a newer one.
const MAGIC: &str = "gptq-journal/2 ";

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::pipeline) struct State {
    /// What is being made.
    pub(super) identity: Identity,
    /// Layers finished.
    pub(super) layers: usize,
    /// Layers of the model.
    pub(super) total_layers: usize,
    /// Hidden states behind the last finished layer; none before the first and after the last.
    pub(super) hidden: Option<HiddenFiles>,
    /// The branches as far as they are, in the plan's order; empty before the first layer is finished.
    pub(super) branches: Vec<BranchState>,
    /// What went otherwise than planned.
    pub(super) warnings: Vec<String>,
    /// Each finished layer.
    pub(super) layer_seconds: Vec<f64>,
    /// Where the time of the finished layers went, and of sealing; `calibrating` is what is left of them.
    pub(super) stage_seconds: StageSeconds,
    /// What was seen of memory meanwhile.
    pub(super) stage_memory: StageMemory,
    /// Everything before, interrupted layers included.
    pub(super) seconds: f64,
    /// Of these, what this journal took.
    pub(super) journal_seconds: f64,
    /// Largest resident memory of all parts of the run, bytes.
    pub(super) peak_memory_bytes: Option<u64>,
    /// Who computed the finished layers.
    pub(super) parts: Vec<LayersComputed>,
    /// Whether all branches are written and checked, and need only be moved to their places.
    pub(super) sealed: bool,
}

/// Hidden states on disk: a file for each stream of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct HiddenFiles {
    /// `bf16`.
    pub(super) dtype: String,
    /// Bytes of a window.
    pub(super) window_bytes: usize,
    /// In the order of the streams.
    pub(super) files: Vec<HiddenFile>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct HiddenFile {
    /// Name in the journal's folder.
    pub(super) name: String,
    /// XXH3-128 of each window, hexadecimal.
    pub(super) checksums: Vec<String>,
}

/// One branch so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::pipeline) struct BranchState {
    /// What is to be reported of it.
    pub(in crate::pipeline) report: BranchReport,
    /// SHA-256 of each tensor that is written, hexadecimal.
    pub(in crate::pipeline) tensors: BTreeMap<String, String>,
}

impl State {
    /// Nothing is done yet.
    pub(super) fn new(identity: Identity, total_layers: usize) -> Self {
        Self {
            identity,
            layers: 0,
            total_layers,
            hidden: None,
            branches: Vec::new(),
            warnings: Vec::new(),
            layer_seconds: Vec::new(),
            stage_seconds: StageSeconds::default(),
            stage_memory: StageMemory::default(),
            seconds: 0.0,
            journal_seconds: 0.0,
            peak_memory_bytes: None,
            parts: Vec::new(),
            sealed: false,
        }
    }

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
}

/// What a run that goes on wants to know.
impl State {
    /// The branches as far as they are, in the plan's order.
    pub(in crate::pipeline) fn branches(&self) -> &[BranchState] {
        &self.branches
    }

    /// What is to be reported of them.
    pub(in crate::pipeline) fn reports(&self) -> Vec<BranchReport> {
        self.branches.iter().map(|branch| branch.report.clone()).collect()
    }

    /// What went otherwise than planned.
    pub(in crate::pipeline) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Each finished layer.
    pub(in crate::pipeline) fn layer_seconds(&self) -> &[f64] {
        &self.layer_seconds
    }

    /// Where the time went.
    pub(in crate::pipeline) fn stage_seconds(&self) -> StageSeconds {
        let StageSeconds { solving, packing, .. } = self.stage_seconds;
        let layers: f64 = self.layer_seconds.iter().sum();
        StageSeconds { calibrating: (layers - solving - packing).max(0.0), ..self.stage_seconds }
    }

    /// What was seen of memory.
    pub(in crate::pipeline) fn stage_memory(&self) -> StageMemory {
        self.stage_memory
    }

    /// The whole run so far.
    pub(in crate::pipeline) fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Of these, what this journal took.
    pub(in crate::pipeline) fn journal_seconds(&self) -> f64 {
        self.journal_seconds
    }

    /// Largest resident memory of all parts of the run, bytes.
    pub(in crate::pipeline) fn peak_memory_bytes(&self) -> Option<u64> {
        self.peak_memory_bytes
    }

    /// Who computed which layers; empty when nobody was interrupted.
    pub(in crate::pipeline) fn interrupted(&self) -> &[LayersComputed] {
        if self.parts.len() > 1 { &self.parts } else { &[] }
    }

    /// How the last layers were computed.
    pub(in crate::pipeline) fn compute(&self) -> &ComputeReport {
        &self.parts.last().expect("a layer is finished").compute
    }

    /// Whether all branches are written and checked.
    pub(in crate::pipeline) fn sealed(&self) -> bool {
        self.sealed
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
