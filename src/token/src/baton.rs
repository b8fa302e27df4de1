//! Who receives from the daemon: one session thread at a time, the holder of the baton.
//!
//! *Expected flow.* While the module answers quickly the holder receives, does the work and answers,
//! request after request, and looks for the next one for a moment before it blocks: nobody is woken
//! on the way. When the module takes longer than [`QUICK`] and requests overlap, or longer than
//! [`SHORT`], the holder passes the baton on before it enters the module, so that N threads are inside
//! at once.
//!
//! *Why.* Waking another thread, or another process's caches going cold, costs as much as a software
//! token's decryption; beside a network HSM it is nothing. Threads that all block in one receive are
//! woken in turn, the coldest first.
//!
//! *Guarantees.* A holder that stays inside the module although it was expected to be quick loses the
//! baton after [`PATIENCE`], so that a hung call holds up no other. A thread whose baton was taken
//! waits for it as the others do.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// A module that answers within this is worth being waited for, whoever else waits. SoftHSM takes
/// 20 µs warm and 45 µs cold; the fastest PCIe HSMs some 100 µs, and those gain from parallel calls.
pub(crate) const QUICK: Duration = Duration::from_micros(75);
/// A call within this is made without waking another thread, as long as calls do not overlap: the
/// first request that comes meanwhile waits for it, the next ones do not.
pub(crate) const SHORT: Duration = PATIENCE;
/// How long the holder looks for the next request before it blocks: the daemon's next one follows
/// within 80 µs when callers are waiting. A node that decrypts once a minute pays for it once a minute.
pub(crate) const LOOK: Duration = Duration::from_micros(120);
/// When a call that was expected to be quick is taken for one that is not. The next request waits
/// that long at most.
const PATIENCE: Duration = Duration::from_millis(1);
/// A call counts at most this much, so that a hang is forgotten after some quick ones.
const SLOW: Duration = Duration::from_millis(4);
const NOBODY: usize = usize::MAX;

/// The baton, and one mark for each thread that says whether it is inside the module.
pub(crate) struct Baton {
    holder: Mutex<usize>,
    free: Condvar,
    /// Odd while the thread is inside on a call that should be quick.
    inside: Vec<AtomicU64>,
    /// The same as `holder`, for a look without the lock.
    at: AtomicUsize,
    relief: OnceLock<Thread>,
    relief_rests: AtomicBool,
    pace: Pace,
}

/// How long a call takes when it is alone in the module, smoothed, in nanoseconds.
///
/// Calls beside others wait for each other's locks and say nothing of the module. They let the value
/// sink a little instead, so that after some hundred of them one thread tries alone again: a module
/// that was slow for a moment would otherwise be taken for slow as long as there is load.
#[derive(Default)]
struct Pace {
    takes: AtomicU64,
    entries: AtomicU64,
    inside: AtomicUsize,
}

impl Baton {
    /// For `threads` threads, which count from 0.
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            holder: Mutex::new(NOBODY),
            free: Condvar::new(),
            inside: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            at: AtomicUsize::new(NOBODY),
            relief: OnceLock::new(),
            relief_rests: AtomicBool::new(false),
            pace: Pace {
                // Until the first calls have shown it.
                takes: AtomicU64::new(nanos(SLOW)),
                ..Pace::default()
            },
        }
    }

    /// How long a call takes, as far as is known.
    pub(crate) fn call_takes(&self) -> Duration {
        Duration::from_nanos(self.pace.takes.load(Ordering::Relaxed))
    }

    /// Makes a call and learns from it.
    pub(crate) fn timed(&self, call: impl FnOnce()) {
        let pace = &self.pace;
        let entry = pace.entries.fetch_add(1, Ordering::AcqRel) + 1;
        let alone = pace.inside.fetch_add(1, Ordering::AcqRel) == 0;
        let began = Instant::now();
        call();
        let took = nanos(began.elapsed().min(SLOW));
        pace.inside.fetch_sub(1, Ordering::AcqRel);
        let alone = alone && pace.entries.load(Ordering::Acquire) == entry;
        let takes = pace.takes.load(Ordering::Relaxed);
        // Two threads that write at once lose one of two nearly equal values.
        let takes = if alone {
            (7 * takes + took) / 8
        } else {
            takes - takes / 128
        };
        pace.takes.store(takes, Ordering::Relaxed);
    }

    /// Waits until thread `me` holds the baton.
    pub(crate) fn take(&self, me: usize) {
        let mut holder = self.lock();
        while *holder != NOBODY {
            holder = self
                .free
                .wait(holder)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *holder = me;
        self.at.store(me, Ordering::Release);
    }

    /// Lets another thread receive.
    pub(crate) fn pass(&self, me: usize) {
        let mut holder = self.lock();
        if *holder == me {
            self.release(&mut holder);
        }
    }

    /// Does what should be quick while holding the baton. False if it was taken meanwhile.
    pub(crate) fn keep_during(&self, me: usize, work: impl FnOnce()) -> bool {
        self.inside[me].fetch_add(1, Ordering::AcqRel);
        if self.relief_rests.swap(false, Ordering::AcqRel)
            && let Some(relief) = self.relief.get()
        {
            relief.unpark();
        }
        work();
        self.inside[me].fetch_add(1, Ordering::AcqRel);
        self.at.load(Ordering::Acquire) == me
    }

    /// Takes the baton from holders that stay inside. For a thread of its own; never returns.
    pub(crate) fn relieve(&self) -> ! {
        // The one caller comes once.
        let _ = self.relief.set(thread::current());
        loop {
            match self.inside_now() {
                Some((holder, call)) => {
                    thread::sleep(PATIENCE);
                    if self.inside_now() == Some((holder, call)) {
                        self.pass(holder);
                    }
                }
                None => {
                    self.relief_rests.store(true, Ordering::Release);
                    // Again, for a holder that went in before it could see that we rest.
                    if self.inside_now().is_none() {
                        thread::park();
                    }
                }
            }
        }
    }

    /// The holder and its call, if it is inside.
    fn inside_now(&self) -> Option<(usize, u64)> {
        let holder = self.at.load(Ordering::Acquire);
        let call = self.inside.get(holder)?.load(Ordering::Acquire);
        (call % 2 == 1).then_some((holder, call))
    }

    fn release(&self, holder: &mut MutexGuard<'_, usize>) {
        **holder = NOBODY;
        self.at.store(NOBODY, Ordering::Release);
        self.free.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_holder_that_stays_inside_loses_the_baton_to_one_that_waits() {
        let baton = Arc::new(Baton::new(2));
        let relief = Arc::clone(&baton);
        thread::spawn(move || relief.relieve());
        baton.take(0);
        let (got, waits) = mpsc::channel();
        let other = Arc::clone(&baton);
        thread::spawn(move || {
            other.take(1);
            got.send(()).expect("the test waits");
        });
        let kept = baton.keep_during(0, || waits.recv_timeout(SOON).expect("it takes over"));
        assert!(!kept);
    }

    #[test]
    fn a_quick_holder_keeps_it_call_after_call() {
        let baton = Arc::new(Baton::new(1));
        let relief = Arc::clone(&baton);
        thread::spawn(move || relief.relieve());
        baton.take(0);
        for _ in 0..1000 {
            assert!(baton.keep_during(0, || {}));
        }
    }

    #[test]
    fn only_a_call_that_is_alone_tells_how_long_calls_take() {
        let baton = Baton::new(2);
        for _ in 0..100 {
            baton.timed(|| {});
        }
        let alone = baton.call_takes();
        assert!(alone < SLOW / 2, "{alone:?}");
        baton.timed(|| baton.timed(|| thread::sleep(SLOW)));
        assert!(baton.call_takes() <= alone);
    }

    #[test]
    fn what_was_passed_on_is_not_passed_again_by_the_former_holder() {
        let baton = Baton::new(2);
        baton.take(0);
        baton.pass(0);
        baton.take(1);
        baton.pass(0);
        assert_eq!(*baton.lock(), 1);
    }
}
