//! The state that an interrupted run resumes from: the finished layers, their branches' contents, and the hidden states behind
//! them; before the first layer, the output Hessians as far as their gradients are taken. Committed after every layer, in an order in
//! which no file that is referred to is ever missing.

mod identity;
mod state;

use std::{
    fs::{self, File, TryLockError},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tch::Kind;

pub(super) use identity::Identity;
pub(super) use state::{BranchState, State};
use state::{CheckedFile, GradientSums, HiddenFile};

use super::{
    output_folder::{JOURNAL_FOLDER, Place},
    window_file::WindowFile,
};
use crate::{
    cluster::Cluster,
    emit::is_partial,
    error::{ClusterError, Error, JournalError, Result},
    machine::peak_memory,
    model::kind_name,
    report::{ComputeReport, LayerExchange, LayersComputed, PhaseReport, StageMemory, StageSeconds},
};

/// Locked by a run, so that no second run uses the same output folder.
const LOCK_FILE: &str = "lock";
/// Time that another rank waits for the folder.
const SHOWN_WITHIN: Duration = Duration::from_secs(10);

/// The journal of a run. Its folder is removed if this is dropped before anything is committed.
pub(super) struct Journal {
    folder: PathBuf,
    lock: Option<File>,
    state: State,
    /// Whether this program has finished a layer of the run already.
    has_committed: bool,
    /// When this program began with the run, and what the run had taken before.
    begun: (Instant, f64),
}

/// Progress of an interrupted run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Begun {
    /// Layers finished.
    pub layers: usize,
    /// Layers of the model.
    pub total_layers: usize,
    /// Calibration windows whose gradients are summed; 0 if the run takes none.
    pub windows: usize,
    /// Of how many.
    pub total_windows: usize,
}

/// Time and memory of a layer, and of all phases so far.
#[derive(Debug, Clone)]
pub(super) struct LayerCosts {
    /// This layer.
    pub(super) seconds: f64,
    pub(super) stage_seconds: StageSeconds,
    pub(super) phases: Vec<PhaseReport>,
    pub(super) stage_memory: StageMemory,
    /// In a run of several processes.
    pub(super) exchange: Option<LayerExchange>,
}

/// Hidden states that were kept: a file for each stream, of all windows, and the kind that they were computed in.
pub(super) struct Kept(pub(super) Vec<(Arc<WindowFile>, Kind)>);

impl Journal {
    /// The journal of the run that `place` holds, or a new one.
    ///
    /// # Errors
    /// When another program has locked it, when it was begun with other settings, or when it is damaged.
    pub(super) fn open(place: &Place<'_>, identity: Identity, total_layers: usize) -> Result<Self> {
        let folder = place.journal()?;
        if !place.restart && !folder.join(state::STATE_FILE).exists() && holds_branches(place.out) {
            let problem =
                format!("it holds a run that was begun, whose journal is not in `{}`", folder.display());
            return Err(Error::journal(place.out, problem));
        }
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let lock = lock(&folder, place.out)?;
        let begun = if place.restart { None } else { State::read(&folder)? };
        let state = match begun {
            Some(state) if state.holds_work() => {
                let differences = state.identity.differences(&identity);
                if !differences.is_empty() {
                    return Err(Error::Journal(JournalError::Differs {
                        path: place.out.into(),
                        layers: state.layers,
                        total: state.total_layers,
                        differences: differences.join("; "),
                    }));
                }
                state
            }
            // No work is lost. The state file is replaced, never removed: without it, unfinished branches are refused.
            _ => {
                let state = State { identity, total_layers, ..State::default() };
                state.write(&folder)?;
                state
            }
        };
        let begun = (Instant::now(), state.seconds);
        let journal = Self { folder, lock: Some(lock), state, has_committed: false, begun };
        journal.remove_others()?;
        Ok(journal)
    }

    /// Takes the root's state on the other ranks.
    pub(super) fn share(&mut self, cluster: &Cluster) -> Result<()> {
        let json = |source| Error::Json { path: self.folder.join(state::STATE_FILE), source };
        let own = cluster.is_root().then(|| serde_json::to_vec(&self.state)).transpose().map_err(json)?;
        let state = cluster.broadcast(own)?;
        if !cluster.is_root() {
            self.state = serde_json::from_slice(&state).map_err(json)?;
        }
        Ok(())
    }

    /// The root's journal on another rank, which reads its hidden states and never changes it.
    ///
    /// # Errors
    /// When this rank's machine does not have the folder.
    pub(super) fn of_root(place: &Place<'_>, cluster: &Cluster) -> Result<Self> {
        let folder = place.journal()?;
        let begun = (Instant::now(), 0.0);
        let mut journal = Self { folder, lock: None, state: State::default(), has_committed: false, begun };
        journal.share(cluster)?;
        // A file system of several machines may take a while to show it.
        let shared = Instant::now();
        while !journal.folder.join(LOCK_FILE).exists() {
            if shared.elapsed() > SHOWN_WITHIN {
                let (name, folder) = (cluster.name(cluster.rank()), journal.folder.display().to_string());
                return Err(ClusterError::NotShared { name, folder }.into());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(journal)
    }

    /// Layers finished.
    pub(super) fn layers(&self) -> usize {
        self.state.layers
    }

    /// The state after the last finished layer.
    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Its folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The hidden states of some windows behind the last finished layer; none before the first and after the last.
    ///
    /// # Errors
    /// When they are not what was written.
    pub(super) fn kept(&self, windows: Range<usize>) -> Result<Option<Kept>> {
        let Some(hidden) = &self.state.hidden else { return Ok(None) };
        let open = |HiddenFile { dtype, window_bytes, file }: &HiddenFile| {
            let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
            let kind = kinds.into_iter().find(|&kind| kind_name(kind) == dtype);
            let kind = kind.ok_or_else(|| self.broken(format!("hidden states in `{dtype}`")))?;
            Ok((Arc::new(file.open(&self.folder, *window_bytes, windows.clone())?), kind))
        };
        Ok(Some(Kept(hidden.iter().map(open).collect::<Result<_>>()?)))
    }

    /// The output Hessians so far: a window file whose entries are layers, and the number of calibration windows in the sums.
    ///
    /// # Errors
    /// When they are not what was written.
    pub(super) fn gradients(&self) -> Result<Option<(WindowFile, usize)>> {
        let Some(sums) = &self.state.gradients else { return Ok(None) };
        let layers = 0..self.state.total_layers;
        Ok(Some((sums.file.open(&self.folder, sums.layer_bytes, layers)?, sums.windows)))
    }

    /// A new file for the output Hessians of all `layers`, with the gradients of so many `windows`. The root creates it, and the last
    /// rank writes to it.
    pub(super) fn next_gradients(
        &self,
        cluster: &Cluster,
        windows: usize,
        layers: usize,
        layer_bytes: usize,
    ) -> Result<WindowFile> {
        let open = if cluster.is_root() { WindowFile::create } else { WindowFile::share };
        let path = self.folder.join(format!("gradients-{windows}"));
        cluster.root_first(|| open(path, layers, layer_bytes))
    }

    /// Commits output Hessians with the gradients of `windows` of `total_windows`; they replace those committed before.
    ///
    /// # Errors
    /// When the disk is full or fails. The journal then is as it was before.
    pub(super) fn commit_gradients(
        &mut self,
        file: &WindowFile,
        windows: usize,
        total_windows: usize,
    ) -> Result<()> {
        let begun = Instant::now();
        let layer_bytes = file.window_bytes();
        let sums = GradientSums { windows, total_windows, layer_bytes, file: CheckedFile::of(file)? };
        let mut state = State { gradients: Some(sums), ..self.state.clone() };
        state.seconds = self.seconds();
        state.journal_seconds += file.seconds() + begun.elapsed().as_secs_f64();
        state.peak_memory_bytes = peak_memory().max(state.peak_memory_bytes);
        state.write(&self.folder)?;
        self.state = state;
        self.remove_others()
    }

    /// Whether a run was resumed from it, or something has been committed since.
    pub(super) fn holds_work(&self) -> bool {
        self.state.holds_work()
    }

    /// Seconds that the run has taken so far.
    fn seconds(&self) -> f64 {
        let (begun, before) = self.begun;
        before + begun.elapsed().as_secs_f64()
    }

    fn broken(&self, what: String) -> Error {
        Error::journal(&self.folder, format!("it holds {what}"))
    }

    /// New files for the hidden states in front of a layer: one for each stream, of values of its kind, each of so many `windows` of so
    /// many `values`. The root creates them, and all ranks write to them.
    pub(super) fn next(
        &self,
        cluster: &Cluster,
        layer: usize,
        kinds: &[Kind],
        windows: usize,
        values: usize,
    ) -> Result<NextStates> {
        let open = if cluster.is_root() { WindowFile::create } else { WindowFile::share };
        let open = |(stream, kind): (usize, &Kind)| {
            let path = self.folder.join(format!("hidden-{layer}-{stream}"));
            open(path, windows, values * kind.elt_size_in_bytes()).map(Arc::new)
        };
        let files = cluster.root_first(|| kinds.iter().enumerate().map(open).collect::<Result<_>>())?;
        Ok(NextStates { files, kinds: kinds.to_vec(), syncing: Vec::new(), committed: !cluster.is_root() })
    }

    /// Commits one more layer. `branches` must be on the disk already; `next` is `None` after the last layer.
    ///
    /// # Errors
    /// When the disk is full or fails. The journal then is as it was before.
    pub(super) fn commit(
        &mut self,
        next: Option<NextStates>,
        branches: Vec<BranchState>,
        warnings: Vec<String>,
        costs: LayerCosts,
        compute: &ComputeReport,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut next = next;
        let mut state = State { branches, warnings, ..self.state.clone() };
        state.layers += 1;
        state.hidden = next.as_mut().map(NextStates::finish).transpose()?;
        state.layer_seconds.push(costs.seconds);
        state.exchanges.extend(costs.exchange);
        state.stage_seconds = costs.stage_seconds;
        state.phases = costs.phases;
        state.stage_memory = costs.stage_memory;
        state.seconds = self.seconds();
        let writing: f64 = next.iter().flat_map(|next| &next.files).map(|file| file.seconds()).sum();
        state.journal_seconds += writing + begun.elapsed().as_secs_f64();
        state.peak_memory_bytes = peak_memory().max(state.peak_memory_bytes);
        match state.parts.last_mut() {
            Some(part) if self.has_committed => part.count += 1,
            _ => state.parts.push(LayersComputed {
                first: self.state.layers,
                count: 1,
                compute: compute.clone(),
            }),
        }
        state.write(&self.folder)?;
        if let Some(next) = &mut next {
            next.committed = true;
        }
        self.state = state;
        self.has_committed = true;
        self.remove_others()
    }

    /// Writes down that all branches are written and checked.
    pub(super) fn seal(&mut self, stage_seconds: StageSeconds, stage_memory: StageMemory) -> Result<()> {
        self.state.sealed = true;
        self.state.stage_seconds = stage_seconds;
        self.state.stage_memory = stage_memory;
        self.state.seconds = self.seconds();
        self.state.write(&self.folder)
    }

    /// Removes the journal of a complete run.
    pub(super) fn remove(mut self) -> Result<()> {
        self.discard().map_err(Error::io("remove", &self.folder))
    }

    fn discard(&mut self) -> std::io::Result<()> {
        // First the file that refers to the others.
        let state = self.folder.join(state::STATE_FILE);
        if state.exists() {
            fs::remove_file(state)?;
        }
        drop(self.lock.take());
        fs::remove_dir_all(&self.folder)
    }

    /// Removes files that the state does not refer to: older hidden states, and the unfinished files of a killed run.
    fn remove_others(&self) -> Result<()> {
        let files = self.state.hidden.iter().flatten().map(|hidden| &hidden.file);
        let sums = self.state.gradients.iter().map(|sums| &sums.file);
        let known: Vec<&str> =
            files.chain(sums).map(|file| file.name.as_str()).chain([state::STATE_FILE, LOCK_FILE]).collect();
        for entry in fs::read_dir(&self.folder).map_err(Error::io("read", &self.folder))? {
            let entry = entry.map_err(Error::io("read", &self.folder))?;
            // NFS keeps files under such names that are removed while another process has them open.
            let in_use = entry.file_name().as_encoded_bytes().starts_with(b".nfs");
            if !in_use && !known.iter().any(|name| entry.file_name() == *name) {
                let path = entry.path();
                let remove = if path.is_dir() { fs::remove_dir_all } else { fs::remove_file };
                remove(&path).map_err(Error::io("remove", path))?;
            }
        }
        Ok(())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // A failure to clean up must not hide the error that led here; the next run does it.
            let _ = match self.state.holds_work() {
                true => self.remove_others().is_ok(),
                false => self.discard().is_ok(),
            };
        }
    }
}

/// Hidden states that are being written. Their files are removed if this is dropped before the commit.
pub(super) struct NextStates {
    files: Vec<Arc<WindowFile>>,
    /// Of the values in each.
    kinds: Vec<Kind>,
    /// Syncs of complete streams that are under way.
    syncing: Vec<JoinHandle<Result<()>>>,
    committed: bool,
}

impl NextStates {
    /// The file of one stream.
    pub(super) fn file(&self, stream: usize) -> &Arc<WindowFile> {
        &self.files[stream]
    }

    /// Syncs a complete stream to the disk while the other streams are computed.
    pub(super) fn sync(&mut self, stream: usize) {
        let file = Arc::clone(&self.files[stream]);
        self.syncing.push(thread::spawn(move || file.sync()));
    }

    /// Sends the checksums of the windows that each rank has written to the root; `windows` are those of all ranks.
    pub(super) fn gather(&mut self, cluster: &Cluster, windows: &[Range<usize>]) -> Result<()> {
        if cluster.ranks() == 1 {
            return Ok(());
        }
        let own = windows[cluster.rank()].clone();
        self.finish_syncing()?;
        let sums = self.files.iter().flat_map(|file| file.checksums_of(own.clone())).collect();
        for (windows, sums) in windows.iter().zip(cluster.gather(sums)?.into_iter().flatten()).skip(1) {
            let of_file = (size_of::<u128>() * windows.len()).max(1);
            for (file, sums) in self.files.iter().zip(sums.chunks_exact(of_file)) {
                file.take_checksums(windows.clone(), sums);
            }
        }
        Ok(())
    }

    fn finish_syncing(&mut self) -> Result<()> {
        // The system reports a failed write once, so that no result may be dropped.
        self.syncing.drain(..).try_for_each(|thread| thread.join().expect("syncing does not panic"))
    }

    fn finish(&mut self) -> Result<Vec<HiddenFile>> {
        self.finish_syncing()?;
        let hidden = |(file, kind): (&Arc<WindowFile>, &Kind)| {
            let (dtype, window_bytes) = (kind_name(*kind).into(), file.window_bytes());
            Ok(HiddenFile { dtype, window_bytes, file: CheckedFile::of(file)? })
        };
        self.files.iter().zip(&self.kinds).map(hidden).collect()
    }
}

impl Drop for NextStates {
    fn drop(&mut self) {
        for thread in self.syncing.drain(..) {
            let _ = thread.join();
        }
        if !self.committed {
            for file in &self.files {
                let _ = fs::remove_file(file.path());
            }
        }
    }
}

/// Progress of the interrupted run in `place`; `None` if there is no run to resume.
pub fn begun(place: &Place<'_>) -> Option<Begun> {
    let state = State::read(&place.journal().ok()?).ok()??;
    let sums = state.gradients.as_ref();
    state.holds_work().then_some(Begun {
        layers: state.layers,
        total_layers: state.total_layers,
        windows: sums.map_or(0, |sums| sums.windows),
        total_windows: sums.map_or(0, |sums| sums.total_windows),
    })
}

/// Whether an output folder holds branches that are being written.
fn holds_branches(out: &Path) -> bool {
    let Ok(entries) = fs::read_dir(out) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        is_partial(&name.to_string_lossy()) && name != JOURNAL_FOLDER
    })
}

/// Locks the journal in `folder` as long as the result lives.
fn lock(folder: &Path, out: &Path) -> Result<File> {
    let path = folder.join(LOCK_FILE);
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(Error::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::Busy { path: out.into() }.into()),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
    }
}
