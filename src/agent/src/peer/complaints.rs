//! Logs refused peers, and keeps somebody who knocks all day from filling the log.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Refusal;

/// One line for each reason in this time.
const QUIET: Duration = Duration::from_secs(10);

/// What was said about refused peers, by reason.
#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<BTreeMap<&'static str, Complaint>>);

#[derive(Debug)]
struct Complaint {
    said: Instant,
    unsaid: u64,
}

impl Complaints {
    /// Logs a refusal, unless one like it was logged a moment ago.
    pub(crate) fn say(&self, endpoint: &impl fmt::Display, refusal: &Refusal) {
        let Some(unsaid) = self.is_due(refusal.label(), Instant::now()) else {
            return;
        };
        let cause = refusal
            .source()
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        tracing::warn!(
            %endpoint,
            reason = refusal.label(),
            not_logged_before = unsaid,
            "refused a peer: {refusal}{cause}",
        );
    }

    /// How many went unsaid since the last line for this reason, if it is time for another.
    fn is_due(&self, label: &'static str, now: Instant) -> Option<u64> {
        let mut complaints = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match complaints.get_mut(label) {
            Some(complaint) if now.duration_since(complaint.said) < QUIET => {
                complaint.unsaid += 1;
                None
            }
            complaint => {
                let unsaid = complaint.map_or(0, |complaint| complaint.unsaid);
                complaints.insert(
                    label,
                    Complaint {
                        said: now,
                        unsaid: 0,
                    },
                );
                Some(unsaid)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_ten_seconds_is_said_for_a_reason_with_the_number_left_out() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(complaints.is_due("uid", start), Some(0));
        assert_eq!(complaints.is_due("uid", after(1)), None);
        assert_eq!(complaints.is_due("uid", after(9)), None);
        assert_eq!(complaints.is_due("exited", after(9)), Some(0));
        assert_eq!(complaints.is_due("uid", after(10)), Some(2));
        assert_eq!(complaints.is_due("uid", after(20)), Some(0));
    }
}
