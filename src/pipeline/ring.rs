//! The collective of a run of several processes, which have one worker each.
//!
//! Sums over windows are passed from rank to rank: the root begins a sum with its windows, the next rank continues it, and the last rank
//! returns it to all. So every sum is taken in the order of the windows, by one process and by many, and is rounded the same. Ranks
//! work at the same time: a matrix is summed in blocks of rows, and while a rank continues one block, the next rank continues the
//! block before it.
//!
//! Every rank solves with the sums, which are the same on all of them.

use tch::{Kind, Tensor};

use super::{
    collective::{Collective, StageStatistics},
    phases::PhaseClock,
    statistics::Captured,
};
use crate::{
    checkpoint::to_bytes,
    cluster::{Cluster, message},
    error::{Result, TorchContext},
};

/// One process of a run.
pub(super) struct RingMember<'c> {
    cluster: &'c Cluster,
    phases: &'c PhaseClock,
}

impl<'c> RingMember<'c> {
    pub(super) fn new(cluster: &'c Cluster, phases: &'c PhaseClock) -> Self {
        Self { cluster, phases }
    }
}

impl Collective for RingMember<'_> {
    fn continues_sums(&self) -> bool {
        true
    }

    fn sum(&mut self, own: Captured) -> Result<Option<StageStatistics>> {
        let (cluster, Captured { mut sums, batches }) = (self.cluster, own);
        cluster.count_barrier();
        let own_tokens = sums
            .iter()
            .zip(&batches)
            .map(|(sums, batches)| batches.iter().map(|batch| sums.tokens_of(batch)).sum::<u64>());
        // Tokens of each group in the sums of the ranks before.
        let before = match cluster.is_root() {
            true => vec![0; sums.len()],
            false => message::numbers(&cluster.receive()?),
        };
        let now: Vec<u64> = own_tokens.zip(&before).map(|(own, before)| own + before).collect();
        cluster.send(message::of_numbers(&now))?;
        for (group, (sums, batches)) in sums.iter_mut().zip(&batches).enumerate() {
            let begun = before[group] > 0;
            for part in sums.parts() {
                if begun {
                    take(&sums.part(&part)?, &cluster.receive()?)?;
                }
                sums.add_to_part(&part, batches, begun, self.phases)?;
                if now[group] > 0 {
                    cluster.send(to_bytes(&sums.part(&part)?)?)?;
                }
            }
        }
        drop(batches);
        // The last rank has the sums; they go around until the rank before it has them too.
        let passes_on = cluster.rank() + 2 < cluster.ranks();
        let all = if cluster.is_last() { now } else { message::numbers(&cluster.receive()?) };
        if passes_on {
            cluster.send(message::of_numbers(&all))?;
        }
        for (sums, &tokens) in sums.iter_mut().zip(&all) {
            sums.count(tokens);
            for part in sums.parts().iter().filter(|_| tokens > 0 && !cluster.is_last()) {
                let values = cluster.receive()?;
                take(&sums.part(part)?, &values)?;
                if passes_on {
                    cluster.send(values)?;
                }
            }
        }
        Ok(Some(sums))
    }

    /// Every rank solves the same, and has the tensors already.
    fn broadcast(&mut self, tensors: Option<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        Ok(tensors.expect("every rank solves"))
    }

    /// A rank has one worker.
    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Copies fp32 values that were received into a tensor of as many.
fn take(to: &Tensor, bytes: &[u8]) -> Result<()> {
    let copy = || {
        let values = Tensor::f_from_data_size(bytes, &to.size(), Kind::Float)?;
        to.shallow_clone().f_copy_(&values)
    };
    copy().torch("receive sums")
}
