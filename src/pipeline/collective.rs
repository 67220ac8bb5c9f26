//! The interface between the workers of a group: the sums and weights that they exchange while they solve a layer.

use std::{
    iter,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use tch::Tensor;

use super::{
    phases::PhaseClock,
    ring::RingMember,
    statistics::{CalibrationStatistics, Captured},
};
use crate::{
    cluster::Cluster,
    error::{Error, Result},
};

/// Calibration statistics of a stage, one for each group of its linears.
pub(super) type StageStatistics = Vec<CalibrationStatistics>;

/// One worker's connection to its group. All workers call the same operations in the same order. The first worker of a process is its
/// root: it alone has the sums, and solves.
pub(super) trait Collective {
    /// Whether [`Collective::sum`] takes batches that were kept, to continue the sums of the workers before with them.
    fn continues_sums(&self) -> bool {
        false
    }

    /// Adds the statistics of all workers, always in the order of the workers. Returns the sums on the root and `None` on
    /// the other workers.
    ///
    /// # Errors
    /// When statistics cannot be copied between devices. [`Error::Interrupted`] when another worker has stopped.
    fn sum(&mut self, own: Captured) -> Result<Option<StageStatistics>>;

    /// Returns the root's tensors on every worker, on the root's device. `tensors` is `Some` on the root and `None` on the
    /// other workers.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when another worker has stopped.
    fn broadcast(&mut self, tensors: Option<Vec<Tensor>>) -> Result<Vec<Tensor>>;

    /// Returns when every worker of this process has called it.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when another worker has stopped.
    fn barrier(&mut self) -> Result<()> {
        let root = self.sum(Captured::default())?.is_some();
        self.broadcast(root.then(Vec::new)).map(drop)
    }
}

/// Connects the workers of a group in this process: as many threads, or in a run of several processes the one worker of each. The
/// first connection is the root's, or that of this process.
pub(super) fn connect<'c>(
    workers: usize,
    cluster: &'c Cluster,
    phases: &'c PhaseClock,
) -> Vec<Box<dyn Collective + Send + 'c>> {
    if cluster.ranks() > 1 {
        assert_eq!(workers, 1, "a rank has one device");
        return vec![Box::new(RingMember::new(cluster, phases))];
    }
    connect_threads(workers)
}

/// Connects as many workers, which are threads of this process. The first connection is the root's.
fn connect_threads<'c>(workers: usize) -> Vec<Box<dyn Collective + Send + 'c>> {
    // Without a buffer no worker gets ahead of the root by more than the statistics of one stage.
    let pair = || {
        let (to_root, statistics) = sync_channel(0);
        let (tensors, from_root) = sync_channel(0);
        ((statistics, tensors), ThreadOther { to_root, from_root })
    };
    let (others, ends): (Vec<_>, Vec<_>) = iter::repeat_with(pair).take(workers - 1).unzip();
    let root: Box<dyn Collective + Send + 'c> = Box::new(ThreadRoot { others });
    let ends = ends.into_iter().map(|end| -> Box<dyn Collective + Send + 'c> { Box::new(end) });
    iter::once(root).chain(ends).collect()
}

/// The root's connection to the other threads.
struct ThreadRoot {
    /// In the order of the workers.
    others: Vec<(Receiver<StageStatistics>, SyncSender<Vec<Tensor>>)>,
}

/// The connection of another thread to the root.
struct ThreadOther {
    to_root: SyncSender<StageStatistics>,
    from_root: Receiver<Vec<Tensor>>,
}

impl Collective for ThreadRoot {
    fn sum(&mut self, own: Captured) -> Result<Option<StageStatistics>> {
        let mut sums = own.sums;
        for (statistics, _) in &self.others {
            for (sum, other) in sums.iter_mut().zip(statistics.recv().map_err(stopped)?) {
                sum.absorb(other)?;
            }
        }
        Ok(Some(sums))
    }

    fn broadcast(&mut self, tensors: Option<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        let tensors = tensors.expect("the root has tensors to share");
        for (_, other) in &self.others {
            other.send(tensors.iter().map(Tensor::shallow_clone).collect()).map_err(stopped)?;
        }
        Ok(tensors)
    }
}

impl Collective for ThreadOther {
    fn sum(&mut self, own: Captured) -> Result<Option<StageStatistics>> {
        self.to_root.send(own.sums).map_err(stopped)?;
        Ok(None)
    }

    fn broadcast(&mut self, _tensors: Option<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        self.from_root.recv().map_err(stopped)
    }
}

/// The other end was dropped: its worker returned an error with the reason.
fn stopped<E>(_disconnected: E) -> Error {
    Error::Interrupted
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tch::{Device, Kind};

    use super::*;
    use crate::pipeline::phases::PhaseClock;

    /// Statistics of one token with these features.
    fn statistics(values: [f32; 2]) -> Captured {
        let mut statistics = CalibrationStatistics::new(2, Device::Cpu, None, Kind::Float).unwrap();
        statistics.add(&Tensor::from_slice(&values).view([1, 2]), None, &PhaseClock::begin(&[])).unwrap();
        Captured { sums: vec![statistics], batches: Vec::new() }
    }

    #[test]
    fn the_root_gets_the_sums_and_shares_tensors() {
        let mut connections = connect_threads(3);
        thread::scope(|scope| {
            let others = connections.split_off(1).into_iter().enumerate();
            for (i, mut connection) in others {
                scope.spawn(move || {
                    let own = statistics([1.0, i as f32]);
                    assert!(connection.sum(own).unwrap().is_none());
                    connection.barrier().unwrap();
                    let shared = connection.broadcast(None).unwrap();
                    assert_eq!(shared, [Tensor::ones([2], (Kind::Float, Device::Cpu))]);
                });
            }
            let mut root = connections.remove(0);
            let sums = root.sum(statistics([2.0, 0.0])).unwrap().unwrap();
            let (hessian, _) = sums.into_iter().next().unwrap().into_parts();
            assert_eq!(hessian.tokens(), 3);
            // (2² + 1² + 1²) / 3.
            assert_eq!(hessian.finish("stage").unwrap().matrix().double_value(&[0, 0]), 2.0);
            root.barrier().unwrap();
            root.broadcast(Some(vec![Tensor::ones([2], (Kind::Float, Device::Cpu))])).unwrap();
        });
    }

    #[test]
    fn a_worker_that_stops_stops_the_others() {
        let mut connections = connect_threads(2);
        let mut other = connections.pop().unwrap();
        drop(connections);
        assert!(matches!(other.sum(Captured::default()), Err(Error::Interrupted)));
        assert!(matches!(other.broadcast(None), Err(Error::Interrupted)));

        let mut root = connect_threads(2).remove(0);
        assert!(matches!(root.barrier(), Err(Error::Interrupted)));
    }
}
