//! Counts refused peers, and keeps somebody who knocks all day from filling the log.

use std::error::Error;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Refusal;

/// One line for each reason in this time.
const QUIET: Duration = Duration::from_secs(10);

/// How many peers were refused, by reason.
#[derive(Debug, Default)]
pub struct Refusals {
    by_label: Mutex<[Tally; Refusal::LABELS.len()]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    total: u64,
    unsaid: u64,
    last_said: Option<Instant>,
}

impl Refusals {
    /// Counts a refusal and logs it, unless one like it was logged a moment ago.
    pub fn record(&self, endpoint: &impl fmt::Display, refusal: &Refusal) {
        let Some(unsaid) = self.count(refusal.label(), Instant::now()) else { return };
        let cause = refusal.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        tracing::warn!(
            endpoint = %endpoint,
            reason = refusal.label(),
            more_since_last_line = unsaid,
            "refused a peer: {refusal}{cause}",
        );
    }

    /// How many were refused so far, for every label.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        let tallies = self.by_label.lock().unwrap_or_else(PoisonError::into_inner);
        Refusal::LABELS.into_iter().zip(tallies.iter().map(|tally| tally.total)).collect()
    }

    /// Counts one; the number of those that were not logged since the last line, if it is time for another line.
    fn count(&self, label: &str, now: Instant) -> Option<u64> {
        let index = Refusal::LABELS.iter().position(|known| *known == label)?;
        let tally = &mut self.by_label.lock().unwrap_or_else(PoisonError::into_inner)[index];
        tally.total += 1;
        if tally.last_said.is_some_and(|said| now.duration_since(said) < QUIET) {
            tally.unsaid += 1;
            return None;
        }
        tally.last_said = Some(now);
        Some(std::mem::take(&mut tally.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_counted_but_only_one_in_ten_seconds_is_said() {
        let refusals = Refusals::default();
        let start = Instant::now();
        assert_eq!(refusals.count("uid", start), Some(0));
        assert_eq!(refusals.count("uid", start + Duration::from_secs(1)), None);
        assert_eq!(refusals.count("uid", start + Duration::from_secs(9)), None);
        assert_eq!(refusals.count("exited", start + Duration::from_secs(9)), Some(0));
        assert_eq!(refusals.count("uid", start + Duration::from_secs(10)), Some(2));
        assert_eq!(refusals.count("uid", start + Duration::from_secs(20)), Some(0));
        assert!(refusals.counts().contains(&("uid", 5)));
        assert!(refusals.counts().contains(&("exited", 1)));
        assert!(refusals.counts().contains(&("no_pidfd", 0)));
    }
}
