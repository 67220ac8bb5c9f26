//! Runs of several processes, which `mpirun` or `srun` starts.

use std::{
    env, fs, iter,
    os::unix::process::{CommandExt, parent_id},
    process, thread,
    time::Duration,
};

use anyhow::{Result, bail};
use gptq::{Error, cluster::Cluster, error::ClusterError};

use super::{args::Command, terminal};

/// Variables in which launchers give the number of processes: Open MPI; MPICH, Intel MPI and Slurm's PMI-2; Slurm itself.
const RANKS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Programs of Open MPI and of PRRTE that start ranks.
const LAUNCHERS: [&str; 6] = ["mpirun", "mpiexec", "orterun", "orted", "prterun", "prted"];
/// Processes between a rank and its launcher, at most: shells and wrappers.
const ANCESTORS: usize = 8;
/// How long the other ranks wait with an error, which the root may have too.
const ROOT_FIRST: Duration = Duration::from_secs(2);
/// How long they wait for the launcher to end them, once a rank is lost.
const LAUNCHER_FIRST: Duration = Duration::from_secs(10);

/// The other processes that a launcher has started with this one; none without a launcher.
pub(super) fn join(command: &Command) -> Result<Cluster> {
    let ranks = RANKS.iter().find_map(|name| env::var(name).ok()?.parse::<usize>().ok());
    if ranks.is_none_or(|ranks| ranks <= 1) {
        return Ok(Cluster::alone());
    }
    if !matches!(command, Command::Quantize(_) | Command::Eval(_)) {
        bail!(
            "only `gptq quantize` and `gptq eval` run in several processes: start this command without mpirun and srun"
        );
    }
    Ok(Cluster::join()?)
}

/// Prints the error of this rank, and ends all ranks. Most errors are those of all ranks, and then the root prints them.
pub(super) fn end_all(cluster: &Cluster, error: &anyhow::Error, code: u8) {
    if !cluster.is_root() {
        thread::sleep(ROOT_FIRST);
        terminal::line(&format!("{}:", cluster.name(cluster.rank())));
    }
    terminal::error(error);
    if let Some(Error::Cluster(ClusterError::Silent { .. })) = error.downcast_ref() {
        // An mpirun on the root's machine ends the others' daemons; if it cannot be reached, they are ended where they are.
        if !cluster.is_root() {
            thread::sleep(LAUNCHER_FIRST);
        }
        end_launcher();
    }
    cluster.abort(code);
}

/// Ends the launcher that has started this process. After a network has failed, Open MPI's would wait for its daemon on the machine that
/// cannot be reached. The second signal within 5 s ends it without that. They come from a process that outlives this one.
fn end_launcher() {
    let parent = |&process: &u32| parent_of(process);
    let mut ancestors = iter::successors(Some(parent_id()), parent).take(ANCESTORS);
    let Some(launcher) = ancestors.find(|&process| is_launcher(process)) else { return };
    let signals =
        format!("kill -TERM {launcher}; sleep 1; kill -TERM {launcher}; sleep 10; kill -KILL {launcher}");
    let mut shell = process::Command::new("sh");
    let silent = process::Stdio::null;
    let _ = shell
        .args(["-c", &signals])
        .process_group(0)
        .stdin(silent())
        .stdout(silent())
        .stderr(silent())
        .spawn();
}

/// Whether a process is a launcher of MPI on the first machine, or its daemon on another one.
fn is_launcher(process: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{process}/comm"));
    name.is_ok_and(|name| LAUNCHERS.contains(&name.trim_end()))
}

/// The parent of a process, from the fourth field of its `stat`; the second is its name in brackets.
fn parent_of(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok().filter(|&parent| parent > 1)
}
