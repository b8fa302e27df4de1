//! Watches the configuration file and gives out each version of it once it is whole.
//!
//! Talos writes the file by truncating it, into a folder that comes late and is removed and made
//! anew; and a YAML file that is cut off can be valid. So a version counts only when all of this holds:
//!
//! - whoever was seen writing it has closed it, or it was moved into place;
//! - nothing happened to it, or to a folder or link on the way to it, for [`QUIET`];
//! - it is the same file, of the same size and times, before and after it was read.
//!
//! **Expected flow:** [`Watch::next`] in the main loop's `select!`; it can be dropped at any time and
//! called again. SIGHUP calls [`Watch::poke`], which is answered by exactly one event, even if nothing
//! changed, as soon as the same conditions hold.
//!
//! **Guarantees:** a version that stays is delivered; of versions that follow each other quickly, the
//! last. The same text may be delivered twice. Of a file longer than [`MAX_BYTES`] one byte more is
//! read, which tells it from a file of the right size.
//!
//! **Assumptions:** a writer that began before the watch and pauses for longer than [`QUIET`] is not
//! seen. Nor is any writer where the file system tells nobody of changes; there the other two
//! conditions hold, checked every [`POLL`].

mod settle;
mod trail;

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hsm_config::MAX_BYTES;
use nix::fcntl::OFlag;
use tokio::time::{Instant, sleep_until};

use settle::{Due, Seen, Settler, Stamp};
use trail::{Happened, Trail};

/// A pause between two writes of one version is far shorter, a person's patience longer.
const QUIET: Duration = Duration::from_millis(500);

/// For what inotify does not tell: mounts on the way, network file systems. One `stat` each time.
const POLL: Duration = Duration::from_secs(2);

/// After this long, somebody should know why a new version is not taken.
const IMPATIENT: Duration = Duration::from_secs(10);

/// What became of the file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It is there. Its content, whole but for what exceeds [`MAX_BYTES`] by more than one byte; else
    /// why it cannot be read.
    Changed(Result<Vec<u8>, String>),
    /// It is gone.
    Removed,
}

/// One watched file.
pub(crate) struct Watch {
    file: PathBuf,
    settler: Settler,
    /// `None` where inotify is not to be had; then only [`POLL`] finds changes.
    trail: Option<Trail>,
    next_poll: Instant,
    warned: bool,
}

impl Watch {
    /// Begins to watch; call it inside the runtime. The file and its folders need not exist.
    pub(crate) fn new(file: &Path) -> Self {
        let trail = Trail::new().map_err(|error| {
            tracing::warn!(%error, "no inotify; the configuration file is polled every 2 s");
        });
        Self::with_trail(file, trail.ok())
    }

    fn with_trail(file: &Path, trail: Option<Trail>) -> Self {
        // Against a later chdir. Fails for an empty path only, which no file has.
        let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let now = Instant::now();
        let mut watch = Self {
            file,
            settler: Settler::new(now),
            trail,
            next_poll: now + POLL,
            warned: false,
        };
        watch.follow();
        let seen = watch.look();
        let age = age(&seen).min(QUIET);
        watch
            .settler
            .observe(seen, now.checked_sub(age).unwrap_or(now));
        watch
    }

    /// Has the file read again as soon as it is whole, changed or not.
    pub(crate) fn poke(&mut self) {
        self.settler.forget();
        self.look_again();
    }

    /// The next version, or the file's end. Safe to drop and call again.
    pub(crate) async fn next(&mut self) -> Change {
        loop {
            let due = self.settler.due(Instant::now());
            if due == Due::Now {
                if let Some(event) = self.take() {
                    self.warned = false;
                    return event;
                }
                continue;
            }
            let wake = match due {
                Due::At(at) => at.min(self.next_poll),
                Due::Now | Due::Nothing => self.next_poll,
            };
            tokio::select! {
                events = happened(self.trail.as_mut()) => self.digest(&events),
                () = sleep_until(wake) => {}
            }
            if Instant::now() >= self.next_poll {
                self.poll();
            }
        }
    }

    fn poll(&mut self) {
        let now = Instant::now();
        self.next_poll = now + POLL;
        if self.look() != *self.settler.seen() || self.trail.as_ref().is_some_and(Trail::is_lost) {
            self.look_again();
        }
        if let Some(since) = self.settler.writing_since()
            && now.duration_since(since) > IMPATIENT
            && !self.warned
        {
            self.warned = true;
            tracing::warn!(
                file = %self.file.display(),
                "the configuration file is still open for writing; it is read when its writer closes it"
            );
        }
    }

    /// Follows the path anew and notes what is at its end.
    fn look_again(&mut self) {
        self.follow();
        let seen = self.look();
        self.settler.observe(seen, Instant::now());
    }

    fn follow(&mut self) {
        if let Some(trail) = &mut self.trail {
            trail.follow(&self.file);
        }
    }

    fn look(&self) -> Seen {
        match fs::metadata(&self.file) {
            Ok(found) => Seen::File(stamp(&found)),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Seen::Absent,
                kind => Seen::Failed(kind),
            },
        }
    }

    /// Returns whether anything happened.
    fn digest(&mut self, events: &[Happened]) {
        let now = Instant::now();
        let mut moved = false;
        for event in events {
            match event {
                // What is written here is no longer what the path leads to.
                Happened::ToFile { .. } if moved => {}
                Happened::ToFile { closed: true } | Happened::ToName { closed: true } => {
                    self.settler.closed(now);
                }
                Happened::ToFile { closed: false } | Happened::ToName { closed: false } => {
                    self.settler.written(now);
                }
                Happened::OnTheWay => {
                    moved = true;
                    self.settler.replaced(now);
                }
                Happened::Touched => self.settler.disturbed(now),
            }
        }
        if moved {
            self.follow();
        }
        if !events.is_empty() {
            let seen = self.look();
            self.settler.observe(seen, now);
        }
    }

    /// Reads what has settled. `None`: it had not, after all.
    fn take(&mut self) -> Option<Change> {
        if self.disturbed_meanwhile() {
            return None;
        }
        let event = match self.settler.seen().clone() {
            Seen::Absent => Change::Removed,
            Seen::Failed(kind) => Change::Changed(Err(kind.to_string())),
            Seen::File(stamp) => match read(&self.file, &stamp) {
                Ok(Some(content)) => Change::Changed(Ok(content)),
                Ok(None) => {
                    self.settler.disturbed(Instant::now());
                    return None;
                }
                Err(error) => Change::Changed(Err(error.to_string())),
            },
        };
        if self.disturbed_meanwhile() {
            return None;
        }
        self.settler.taken();
        Some(event)
    }

    /// Looks at everything that may have happened up to now.
    fn disturbed_meanwhile(&mut self) -> bool {
        while let Some(events) = self.trail.as_mut().and_then(Trail::read_now) {
            self.digest(&events);
        }
        let seen = self.look();
        self.settler.observe(seen, Instant::now());
        self.settler.due(Instant::now()) != Due::Now
    }
}

async fn happened(trail: Option<&mut Trail>) -> Vec<Happened> {
    match trail {
        Some(trail) => trail.read().await,
        None => std::future::pending().await,
    }
}

/// The content, if the file is the one with this stamp before and after reading.
fn read(path: &Path, stamp_before: &Stamp) -> io::Result<Option<Vec<u8>>> {
    // Non-blocking, or a pipe in the file's place would hold the daemon.
    let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let found = file.metadata()?;
    if stamp(&found) != *stamp_before {
        return Ok(None);
    }
    if !found.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut content = Vec::new();
    (&mut file)
        .take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut content)?;
    let whole = content.len() as u64 == found.size() || content.len() > MAX_BYTES;
    Ok((whole && stamp(&file.metadata()?) == *stamp_before).then_some(content))
}

fn stamp(found: &fs::Metadata) -> Stamp {
    Stamp {
        device: found.dev(),
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    }
}

/// For how long a file found at the start has been as it is. A time in the future says nothing: a
/// node's clock may be set only after the daemon started.
fn age(seen: &Seen) -> Duration {
    let Seen::File(stamp) = seen else {
        return Duration::ZERO;
    };
    let (seconds, nanos) = stamp.modified.max(stamp.changed);
    let Ok(seconds) = u64::try_from(seconds) else {
        return Duration::MAX;
    };
    let since = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos.try_into().unwrap_or(0));
    SystemTime::now()
        .duration_since(since)
        .unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests;
