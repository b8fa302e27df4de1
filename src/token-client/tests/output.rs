//! What a module writes may hold anything: at which level of the log it shows.
//!
//! A program of its own, with one test: `tracing` asks the thread that first comes by a log line
//! whether anybody listens, and threads of other tests would answer no.

mod support;

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use hsm_token_client::Token;
use support::{SECOND, SoftHsm, is_down, script, wait_for};
use tokio::time::sleep;

/// What is logged while a host writes, at this level.
async fn log_of_a_talking_host(level: tracing::Level) -> String {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer({
            let log = log.clone();
            move || log.clone()
        })
        .finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let hsm = SoftHsm::new();
    let talk = "echo 'the PIN is 648219'; printf 'and\\033[2J more' >&2; exit 1";
    let token = Token::start(script(&hsm, talk));
    wait_for(&token, is_down).await;
    sleep(SECOND / 10).await;
    let bytes = log.0.lock().expect("log").clone();
    String::from_utf8(bytes).expect("text")
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("log").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_a_module_writes_is_shown_at_debug_and_only_counted_at_info() {
    let info = log_of_a_talking_host(tracing::Level::INFO).await;
    assert!(!info.contains("648219") && !info.contains("more"), "{info}");
    assert!(
        info.contains("The module wrote output") && info.contains("lines=2"),
        "{info}"
    );
    assert_eq!(info.matches("The token is down.").count(), 1, "{info}");
    let debug = log_of_a_talking_host(tracing::Level::DEBUG).await;
    assert!(debug.contains("module says: the PIN is 648219"), "{debug}");
    assert!(debug.contains("module says: and [2J more"), "{debug}");
}
