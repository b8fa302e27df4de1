//! What a module writes to stdout and stderr: read so that it never blocks, shown only to who asks.
//!
//! The text may hold anything, a PIN too. Lines go to the log at debug level; at info there is only
//! their number.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

use crate::text;

/// A line is cut here; the rest of it is not shown.
const MAX_LINE_LEN: usize = 512;
/// Lines shown per second; more are counted only.
const LINES_PER_SECOND: u32 = 50;
/// A module that writes all the time gets 16 KiB per turn and then waits: 3 MB/s are more than any
/// log, and cost the daemon's only thread less than one per cent.
const READ_LEN: usize = 16 * 1024;
const PAUSE: Duration = Duration::from_millis(5);
/// Reads after the host is gone: as much as a pipe holds.
const LAST_READS: usize = 64 * 1024 / READ_LEN;
/// How often the number of lines is told while there are new ones.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Reads until the last process that holds the other end is gone, or until the host is (`gone` is
/// dropped) and what it wrote was read: something that it left behind may hold the other end on.
pub(crate) async fn read(
    token: String,
    host_pid: u32,
    output: OwnedFd,
    mut gone: oneshot::Receiver<()>,
) -> io::Result<()> {
    let mut pipe = pipe::Receiver::from_owned_fd(output)?;
    let mut buffer = Zeroizing::new(vec![0; READ_LEN]);
    let mut log = Log::new(token, host_pid);
    loop {
        let n = tokio::select! {
            n = pipe.read(&mut buffer) => n?,
            _ = &mut gone => break,
        };
        if n == 0 {
            break;
        }
        log.write(&buffer[..n]);
        if n == READ_LEN {
            sleep(PAUSE).await;
        }
    }
    // The runtime may not know yet of what the host wrote last, so that it is not asked.
    for _ in 0..LAST_READS {
        match nix::unistd::read(&pipe, &mut buffer) {
            Ok(n) if n > 0 => log.write(&buffer[..n]),
            _ => break,
        }
    }
    log.end();
    Ok(())
}

struct Log {
    token: String,
    host_pid: u32,
    lines: Lines,
    told: u64,
    told_at: Instant,
}

impl Log {
    fn new(token: String, host_pid: u32) -> Self {
        let told_at = Instant::now();
        Self {
            token,
            host_pid,
            lines: Lines::default(),
            told: 0,
            told_at,
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let (token, host_pid) = (&self.token, self.host_pid);
        for line in self.lines.take(bytes, Instant::now()) {
            tracing::debug!(token, host_pid, "module says: {line}");
        }
        if self.told_at.elapsed() >= REPORT_EVERY {
            self.report();
        }
    }

    fn end(&mut self) {
        // No bytes are the end, which ends the line.
        self.write(&[]);
        self.report();
    }

    fn report(&mut self) {
        let lines = self.lines.count - self.told;
        if lines > 0 {
            tracing::info!(
                token = self.token,
                host_pid = self.host_pid,
                lines,
                "The module wrote output; it is shown at log level debug."
            );
        }
        self.told = self.lines.count;
        self.told_at = Instant::now();
    }
}

#[derive(Default)]
struct Lines {
    partial: Zeroizing<Vec<u8>>,
    /// All lines that ended so far.
    count: u64,
    second: Option<Instant>,
    shown: u32,
}

impl Lines {
    /// The lines that `bytes` complete, as far as they may be shown. An empty slice is the end.
    fn take(&mut self, bytes: &[u8], now: Instant) -> Vec<String> {
        let mut shown = Vec::new();
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            let line = part.strip_suffix(b"\n");
            let room = MAX_LINE_LEN.saturating_sub(self.partial.len());
            let text = line.unwrap_or(part);
            self.partial
                .extend_from_slice(&text[..text.len().min(room)]);
            if line.is_some() {
                shown.extend(self.end_line(now));
            }
        }
        if bytes.is_empty() && !self.partial.is_empty() {
            shown.extend(self.end_line(now));
        }
        shown
    }

    fn end_line(&mut self, now: Instant) -> Option<String> {
        let line = std::mem::take(&mut self.partial);
        self.count += 1;
        if self
            .second
            .is_none_or(|at| now - at >= Duration::from_secs(1))
        {
            self.second = Some(now);
            self.shown = 0;
        }
        self.shown += 1;
        (self.shown <= LINES_PER_SECOND).then(|| text::printable(&String::from_utf8_lossy(&line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together_cut_and_cleaned() {
        let mut lines = Lines::default();
        let now = Instant::now();
        assert!(lines.take(b"one", now).is_empty());
        assert_eq!(
            lines.take(b" line\n\x1b[31mtwo\n", now),
            ["one line", " [31mtwo"]
        );
        let long = [b'x'; 5000];
        assert!(lines.take(&long, now).is_empty());
        assert_eq!(lines.take(b"yy\n", now), ["x".repeat(MAX_LINE_LEN)]);
        assert!(lines.take(b"no newline", now).is_empty());
        assert_eq!(lines.take(b"", now), ["no newline"]);
        assert_eq!(lines.count, 4);
    }

    #[test]
    fn more_lines_than_may_be_shown_are_counted() {
        let mut lines = Lines::default();
        let now = Instant::now();
        let shown = lines.take(&b"\n".repeat(1000), now);
        assert_eq!(shown.len(), LINES_PER_SECOND as usize);
        assert_eq!(lines.count, 1000);
        assert_eq!(lines.take(b"a\n", now + Duration::from_secs(1)), ["a"]);
    }
}
