//! One GET over a unix socket: as much of HTTP/1.1 as the daemon's health socket speaks.
//!
//! The request says `Connection: close`, so the answer ends where the stream does. An answer in
//! chunks, which the daemon never gives, is refused.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use thiserror::Error;

/// The page is made from memory: it takes microseconds. A daemon that is stopped answers never.
const PATIENCE: Duration = Duration::from_secs(5);

/// 64 keys and 8 tokens take some 40 KiB.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Why there is no page.
#[derive(Debug, Error)]
pub(crate) enum HttpError {
    #[error("nobody can be reached there")]
    Connect(#[source] io::Error),
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Late,
    #[error("the answer is longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("the answer is not one of the daemon's: {0}")]
    Strange(&'static str),
    #[error("the answer is HTTP status {0}")]
    Status(u16),
}

/// The body that is served under `path`.
pub(crate) fn get(socket: &Path, path: &str) -> Result<Vec<u8>, HttpError> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = UnixStream::connect(socket).map_err(HttpError::Connect)?;
    let timed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => HttpError::Late,
        _ => HttpError::Broken(error),
    };
    stream.set_write_timeout(Some(PATIENCE)).map_err(timed)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(timed)?;

    let mut answer = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HttpError::Late);
        }
        stream.set_read_timeout(Some(left)).map_err(timed)?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(timed(error)),
        }
        if answer.len() > MAX_BYTES {
            return Err(HttpError::TooLong);
        }
    }
    body(&answer).map(<[u8]>::to_vec)
}

/// The body of a whole answer.
pub(crate) fn body(answer: &[u8]) -> Result<&[u8], HttpError> {
    const STRANGE: fn(&'static str) -> HttpError = HttpError::Strange;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.ok_or(STRANGE("its header does not end"))? + 4);
    let head = std::str::from_utf8(head).map_err(|_| STRANGE("its header is not text"))?;
    let mut lines = head.split("\r\n");
    let code = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1."))
        .and_then(|line| line.split(' ').nth(1))
        .and_then(|code| code.parse().ok())
        .ok_or(STRANGE("it is not HTTP"))?;
    for line in lines {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(STRANGE("it comes in chunks"));
        }
        if name.eq_ignore_ascii_case("content-length") && value.trim().parse() != Ok(body.len()) {
            return Err(STRANGE("its length is not what it says"));
        }
    }
    match code {
        200 => Ok(body),
        _ => Err(HttpError::Status(code)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn an_answer_is_read_whatever_the_case_of_its_header() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-LENGTH: 2\r\ndate: now\r\n\r\n{}";
        assert_eq!(body(answer).unwrap(), b"{}");
        assert_eq!(body(b"HTTP/1.0 200 OK\r\n\r\n").unwrap(), b"");
    }

    #[test]
    fn what_is_not_a_whole_answer_of_the_daemon_is_named() {
        for (answer, word) in [
            (&b""[..], "does not end"),
            (b"HTTP/1.1 200 OK\r\nx: y\r\n", "does not end"),
            (b"SSH-2.0\r\n\r\n", "not HTTP"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}", "length"),
            (
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                "chunks",
            ),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
            (b"HTTP/1.1 \xff\r\n\r\n", "not text"),
        ] {
            let error = body(answer).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_daemon_that_never_answers_is_left_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let start = Instant::now();
        assert!(matches!(get(&path, "/status"), Err(HttpError::Late)));
        assert!(start.elapsed() < PATIENCE * 2);
    }
}
