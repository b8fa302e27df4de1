//! When has a file settled? A state machine over what is seen and heard; no file, no clock.

use std::io;

use tokio::time::Instant;

use super::QUIET;

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

/// What is at the end of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    Absent,
    File(Stamp),
    /// Something that cannot be looked at.
    Failed(io::ErrorKind),
}

impl Seen {
    fn is_same_file(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => {
                (one.device, one.inode) == (other.device, other.inode)
            }
            _ => self == other,
        }
    }
}

/// When to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Not before something happens.
    Nothing,
    /// If nothing happens until then.
    At(Instant),
    Now,
}

/// What is known of the file's present state.
pub(super) struct Settler {
    seen: Seen,
    quiet_since: Instant,
    /// Somebody wrote and has not closed since.
    writing_since: Option<Instant>,
    /// The path was heard to lead elsewhere, and was not looked at since.
    replaced: bool,
    /// What was last delivered. `None`: whatever is there is to be delivered.
    taken: Option<Seen>,
}

impl Settler {
    /// Nothing there, which needs no telling.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            seen: Seen::Absent,
            quiet_since: now,
            writing_since: None,
            replaced: false,
            taken: Some(Seen::Absent),
        }
    }

    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    pub(super) fn writing_since(&self) -> Option<Instant> {
        self.writing_since
    }

    /// The path was looked at.
    pub(super) fn observe(&mut self, seen: Seen, now: Instant) {
        // Another file that nobody announced (a mount, a missed event): its writer, if any, is unknown,
        // and the former file's must not be waited for. After an announcement, a writer heard of
        // since is the new file's.
        if !self.replaced && !seen.is_same_file(&self.seen) {
            self.writing_since = None;
        }
        self.replaced = false;
        if seen != self.seen {
            self.seen = seen;
            self.quiet_since = now;
        }
    }

    /// Somebody wrote to the file and has it open.
    pub(super) fn written(&mut self, now: Instant) {
        self.writing_since.get_or_insert(now);
        self.quiet_since = now;
    }

    /// Somebody who could write closed the file.
    pub(super) fn closed(&mut self, now: Instant) {
        self.writing_since = None;
        self.quiet_since = now;
    }

    /// The path leads elsewhere: to another file, by another link, to nothing.
    pub(super) fn replaced(&mut self, now: Instant) {
        self.writing_since = None;
        self.replaced = true;
        self.quiet_since = now;
    }

    /// Something else happened.
    pub(super) fn disturbed(&mut self, now: Instant) {
        self.quiet_since = now;
    }

    /// What is there counts as new.
    pub(super) fn forget(&mut self) {
        self.taken = None;
    }

    /// What is there was delivered.
    pub(super) fn taken(&mut self) {
        self.taken = Some(self.seen.clone());
    }

    pub(super) fn due(&self, now: Instant) -> Due {
        if self.writing_since.is_some() || self.taken.as_ref() == Some(&self.seen) {
            return Due::Nothing;
        }
        match self.quiet_since + QUIET {
            at if at <= now => Due::Now,
            at => Due::At(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn file(inode: u64, size: u64) -> Seen {
        Seen::File(Stamp {
            device: 1,
            inode,
            size,
            modified: (0, 0),
            changed: (0, 0),
        })
    }

    fn ms(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_file_is_due_when_it_was_quiet_for_long_enough() {
        let start = Instant::now();
        let mut settler = Settler::new(start);
        assert_eq!(settler.due(ms(start, 9000)), Due::Nothing);
        settler.observe(file(1, 10), start);
        assert_eq!(settler.due(ms(start, 499)), Due::At(ms(start, 500)));
        settler.observe(file(1, 11), ms(start, 499));
        assert_eq!(settler.due(ms(start, 500)), Due::At(ms(start, 999)));
        assert_eq!(settler.due(ms(start, 999)), Due::Now);
        settler.taken();
        assert_eq!(settler.due(ms(start, 9000)), Due::Nothing);
    }

    #[test]
    fn a_writer_is_waited_for_however_long_it_pauses() {
        let start = Instant::now();
        let mut settler = Settler::new(start);
        settler.observe(file(1, 0), start);
        settler.written(start);
        assert_eq!(settler.due(ms(start, 60_000)), Due::Nothing);
        settler.closed(ms(start, 60_000));
        assert_eq!(settler.due(ms(start, 60_000)), Due::At(ms(start, 60_500)));
    }

    #[test]
    fn a_writer_of_a_file_that_was_replaced_is_not_waited_for() {
        let start = Instant::now();
        let mut settler = Settler::new(start);
        settler.observe(file(1, 0), start);
        settler.written(start);
        settler.replaced(start);
        settler.observe(file(2, 0), start);
        assert_eq!(settler.due(ms(start, 500)), Due::Now);
        // The same without being told.
        settler.written(start);
        settler.observe(file(3, 0), start);
        assert_eq!(settler.due(ms(start, 500)), Due::Now);
    }

    #[test]
    fn a_writer_heard_of_after_the_replacement_is_waited_for() {
        let start = Instant::now();
        let mut settler = Settler::new(start);
        settler.observe(file(1, 0), start);
        settler.replaced(start);
        settler.written(start);
        settler.observe(file(2, 0), start);
        assert_eq!(settler.due(ms(start, 9000)), Due::Nothing);
    }

    #[test]
    fn a_poke_makes_the_same_state_due_again() {
        let start = Instant::now();
        let mut settler = Settler::new(start);
        settler.forget();
        assert_eq!(settler.due(ms(start, 500)), Due::Now);
        settler.taken();
        settler.observe(file(1, 0), start);
        settler.observe(Seen::Absent, ms(start, 100));
        assert_eq!(settler.due(ms(start, 9000)), Due::Nothing, "came and went");
    }
}
