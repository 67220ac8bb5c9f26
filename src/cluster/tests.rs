//! The ring's operations, over channels between threads.

use std::{
    sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use super::*;
use crate::error::ClusterError;

/// A link of a thread.
struct Channels {
    next: Mutex<Sender<Vec<u8>>>,
    before: Mutex<Receiver<Vec<u8>>>,
}

impl Link for Channels {
    fn send(&self, message: Vec<u8>) -> Result<()> {
        self.next.lock().unwrap().send(message).unwrap();
        Ok(())
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let gone = ClusterError::Silent { name: name(0, "gone"), seconds: 0 };
        self.before.lock().unwrap().recv().map_err(|_| gone.into())
    }

    fn abort(&self, _code: u8) {}

    fn leave(&self) {}
}

/// So many ranks, connected.
pub(crate) fn ring(ranks: usize) -> Vec<Cluster> {
    let (mut senders, receivers): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
    // A rank sends what the next one receives.
    senders.rotate_left(1);
    let hosts: Vec<String> = (0..ranks).map(|rank| format!("host-{rank}")).collect();
    let links = senders.into_iter().zip(receivers).map(|(next, before)| {
        let link: Box<dyn Link> = Box::new(Channels { next: Mutex::new(next), before: Mutex::new(before) });
        link
    });
    links.enumerate().map(|(rank, link)| Cluster::of(rank, hosts.clone(), link)).collect()
}

/// What `work` returns on each rank.
pub(crate) fn on_all<T: Send>(ranks: usize, work: impl Fn(Cluster) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ring(ranks).into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn messages_reach_every_rank_and_the_root() {
    for ranks in 1..5 {
        for length in [0, 1, PIECE, 3 * PIECE + 5] {
            let message: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let found = on_all(ranks, |cluster| {
                let all = cluster.gather(vec![cluster.rank() as u8; cluster.rank()]).unwrap();
                assert_eq!(all.is_some(), cluster.is_root());
                let everywhere = cluster.all_gather(vec![cluster.rank() as u8; cluster.rank()]).unwrap();
                assert_eq!(everywhere.len(), ranks);
                assert!(everywhere.iter().enumerate().all(|(rank, sent)| *sent == vec![rank as u8; rank]));
                cluster.barrier().unwrap();
                let found = cluster.broadcast(cluster.is_root().then(|| message.clone())).unwrap();
                cluster.leave();
                (all, found)
            });
            let gathered: Vec<Vec<u8>> = (0..ranks).map(|rank| vec![rank as u8; rank]).collect();
            assert_eq!(found[0].0.as_ref(), Some(&gathered), "{ranks}");
            assert!(found.iter().all(|(_, found)| *found == message), "{ranks} ranks, {length} bytes");
        }
    }
}

#[test]
fn the_root_works_first() {
    let order = Mutex::new(Vec::new());
    on_all(3, |cluster| {
        let rank = cluster.rank();
        let work = || -> Result<()> {
            order.lock().unwrap().push(rank);
            Ok(())
        };
        cluster.root_first(work).unwrap();
    });
    assert_eq!(order.into_inner().unwrap()[0], 0);
}

#[test]
fn a_rank_that_is_gone_is_an_error() {
    let mut ranks = ring(2);
    drop(ranks.remove(0));
    assert!(ranks[0].receive().unwrap_err().to_string().contains("gone"));
}
