//! How fast a host that was lost is replaced: at once, but not for ever; then slower and slower.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

/// A host that served and is lost is replaced at once, at most this many times in [`WINDOW`]: an
/// operation that kills its host is sent twice, and one more may be the operator's `kill -9`.
const IMMEDIATE: usize = 3;
const WINDOW: Duration = Duration::from_secs(30);

/// First and longest pause between the starts of two tries. A token that comes back must serve
/// within 15 s: 10 s of pause, and the rest to load a module and log in.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A try that itself took long still leaves the machine this much rest.
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// A host that served this long is sound: the next loss begins with the first pause again.
const SOUND: Duration = Duration::from_secs(10);

/// The pace of one token's recovery.
#[derive(Default)]
pub(crate) struct Ladder {
    immediate: VecDeque<Instant>,
    failed: u32,
}

impl Ladder {
    /// A host that served since `up` is lost: may the next one start at once?
    pub(crate) fn lost(&mut self, up: Instant, now: Instant) -> bool {
        if now - up >= SOUND {
            self.failed = 0;
        }
        while self.immediate.front().is_some_and(|at| now - *at >= WINDOW) {
            self.immediate.pop_front();
        }
        let allowed = self.immediate.len() < IMMEDIATE;
        if allowed {
            self.immediate.push_back(now);
        }
        allowed
    }

    /// How long to wait after a try that began at `tried` and failed.
    pub(crate) fn pause(&mut self, tried: Instant, now: Instant) -> Duration {
        let full = FIRST_PAUSE
            .saturating_mul(1 << self.failed.min(8))
            .min(LONGEST_PAUSE);
        self.failed = self.failed.saturating_add(1);
        // Nodes that lost one HSM together must not come back to it together: 80 to 100 %.
        let full = full * (80 + jitter(21)) / 100;
        full.saturating_sub(now - tried).max(LEAST_PAUSE * 8 / 10)
    }
}

/// A number below `end`, another one each time and on each node. The standard library seeds its
/// hashers from the system's randomness.
fn jitter(end: u32) -> u32 {
    (RandomState::new().hash_one(()) % u64::from(end)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_from_one_to_ten_seconds() {
        let mut ladder = Ladder::default();
        let now = Instant::now();
        for seconds in [1, 2, 4, 8, 10, 10, 10] {
            let full = Duration::from_secs(seconds);
            let pause = ladder.pause(now, now);
            assert!(pause <= full && pause >= full * 8 / 10, "{pause:?}");
        }
    }

    #[test]
    fn a_try_that_took_long_is_followed_by_a_short_pause() {
        let mut ladder = Ladder {
            failed: 9,
            ..Ladder::default()
        };
        let now = Instant::now();
        assert_eq!(ladder.pause(now, now + 60 * LONGEST_PAUSE), 800 * MS);
    }

    #[test]
    fn a_crash_loop_runs_out_of_immediate_replacements() {
        let mut ladder = Ladder::default();
        let mut now = Instant::now();
        for _ in 0..IMMEDIATE {
            now += 100 * MS;
            assert!(ladder.lost(now - 50 * MS, now));
        }
        assert!(!ladder.lost(now, now + MS));
        assert!(ladder.lost(now, now + WINDOW));
    }

    #[test]
    fn a_host_that_served_long_enough_resets_the_pauses() {
        let mut ladder = Ladder {
            failed: 9,
            ..Ladder::default()
        };
        let now = Instant::now();
        ladder.lost(now, now + SOUND - MS);
        assert_eq!(ladder.failed, 9);
        ladder.lost(now, now + SOUND);
        assert_eq!(ladder.failed, 0);
    }
}
