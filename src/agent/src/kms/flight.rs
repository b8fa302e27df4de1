//! Identical operations in flight share one answer.
//!
//! kube-apiserver 1.37 decrypts ten watch events at once and does not deduplicate: ten Decrypts of
//! one seed arrive together at every cold start.
//!
//! *Guarantees*: while an operation for a key is under way, nobody starts a second one; every joiner
//! gets its answer. The operation runs in a task of its own, so a caller that goes away (its deadline
//! passed, its connection broke) takes nothing from the others. Nothing is kept once it has ended:
//! this is no cache.
//! *Caveat*: the operation has the deadline of the caller that began it. A joiner with a later one
//! begins anew if that deadline was what failed it.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

type Waiters<K, V> = Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>;

/// Operations under way, by what they compute.
pub(crate) struct Flights<K, V>(Waiters<K, V>);

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the flight for `key`, or begins it with `start`. True if another caller had begun it.
    /// `None` if the operation's task ended without an answer, which only a runtime that is shutting
    /// down does.
    pub(crate) async fn join<F>(&self, key: K, start: impl FnOnce() -> F) -> (Option<V>, bool)
    where
        F: Future<Output = V> + Send + 'static,
    {
        let (mut answer, joined) = self.enter(key, start);
        let value = match answer.wait_for(Option::is_some).await {
            Ok(value) => value.clone(),
            Err(_) => None,
        };
        (value, joined)
    }

    fn enter<F>(&self, key: K, start: impl FnOnce() -> F) -> (watch::Receiver<Option<V>>, bool)
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut flights = lock(&self.0);
        if let Some(answer) = flights.get(&key) {
            return (answer.clone(), true);
        }
        let (tell, answer) = watch::channel(None);
        flights.insert(key.clone(), answer.clone());
        let landing = Landing {
            flights: Arc::clone(&self.0),
            key,
        };
        let operation = start();
        tokio::spawn(async move {
            let value = operation.await;
            // First off the board, then the answer: who comes later begins a new flight.
            drop(landing);
            let _ = tell.send(Some(value));
        });
        (answer, false)
    }
}

/// Takes the flight off the board however its task ends.
struct Landing<K: Eq + Hash, V> {
    flights: Waiters<K, V>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        lock(&self.flights).remove(&self.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    async fn slow(count: Arc<AtomicU32>) -> u32 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        count.fetch_add(1, Ordering::Relaxed) + 1
    }

    #[tokio::test(start_paused = true)]
    async fn ten_at_once_are_one_operation_and_the_next_is_another() {
        let flights = Flights::<&str, u32>::default();
        let count = Arc::new(AtomicU32::new(0));
        let ten = (0..10).map(|_| flights.join("seed", || slow(Arc::clone(&count))));
        let mut joined = 0;
        let mut ten: Vec<_> = ten.map(Box::pin).collect();
        // Poll each once, so that all are aboard before any lands.
        for future in &mut ten {
            assert!(futures_poll(future).is_none());
        }
        for future in ten {
            let (value, shared) = future.await;
            assert_eq!(value, Some(1));
            joined += u32::from(shared);
        }
        assert_eq!(joined, 9);
        let (value, shared) = flights.join("seed", || slow(Arc::clone(&count))).await;
        assert_eq!((value, shared), (Some(2), false));
        assert!(lock(&flights.0).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_leader_does_not_fail_its_followers() {
        let flights = Flights::<&str, u32>::default();
        let count = Arc::new(AtomicU32::new(0));
        let mut leader = Box::pin(flights.join("seed", || slow(Arc::clone(&count))));
        assert!(futures_poll(&mut leader).is_none());
        let mut follower = Box::pin(flights.join("seed", || slow(Arc::clone(&count))));
        assert!(futures_poll(&mut follower).is_none());
        drop(leader);
        assert_eq!(follower.await, (Some(1), true));
    }

    fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
