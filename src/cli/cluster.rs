//! Runs of several processes, which `mpirun` or `srun` starts.

use std::{env, thread, time::Duration};

use anyhow::{Result, bail};
use gptq::cluster::Cluster;

use super::{args::Command, terminal};

/// Variables in which launchers give the number of processes: Open MPI; MPICH, Intel MPI and Slurm's PMI-2; Slurm itself.
const RANKS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// The other processes that a launcher has started with this one; none without a launcher.
pub(super) fn join(command: &Command) -> Result<Cluster> {
    let ranks = RANKS.iter().find_map(|name| env::var(name).ok()?.parse::<usize>().ok());
    if ranks.is_none_or(|ranks| ranks <= 1) {
        return Ok(Cluster::alone());
    }
    if !matches!(command, Command::Quantize(_)) {
        bail!("only `gptq quantize` runs in several processes: start this command without mpirun and srun");
    }
    Ok(Cluster::join()?)
}

/// Prints the error of this rank, and ends all ranks. Most errors are those of all ranks, and then the root prints them.
pub(super) fn end_all(cluster: &Cluster, error: &anyhow::Error, code: u8) {
    if !cluster.is_root() {
        thread::sleep(Duration::from_secs(2));
        terminal::line(&format!("{}:", cluster.name(cluster.rank())));
    }
    terminal::error(error);
    cluster.abort(code);
}
