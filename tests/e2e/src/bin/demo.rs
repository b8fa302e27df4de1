//! `hack/demo`: plays the story and says what to try next. Exits 0 only if every step was seen to work.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use e2e::story;
use e2e::workbench::Workbench;

fn main() -> ExitCode {
    let began = Instant::now();
    let played = Workbench::clean_up_on_signals()
        .and_then(|()| Workbench::open())
        .and_then(|bench| story::play(&bench));
    match played {
        Ok(()) => {
            summary(began.elapsed());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn summary(took: Duration) {
    let dist = std::env::var("HSMD").unwrap_or_default();
    let dist = Path::new(&dist)
        .parent()
        .unwrap_or(Path::new("target/dist"))
        .display();
    println!(
        "
== Everything above was seen to work ({:.0} s). Nothing is left running.

   Next:
     {dist}/hsmd check FILE     look at a configuration without starting anything
     {dist}/hsmd run --help     every option of the daemon
     hack/test                  all tests, on the same real parts
     hack/bench kms             how fast, beside a Go plugin and the bare limits",
        took.as_secs_f64()
    );
}
