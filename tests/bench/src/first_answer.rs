//! Waits for a server that is not there yet, and says when it first answers.
//!
//! It runs as the caller before the server is started, so that nothing but the server is waited for.

use std::time::Duration;

use crate::args::FirstAnswerArgs;
use crate::client::Client;
use crate::error::BenchError;

/// Between two tries. A connect to an absent socket costs a few microseconds, so this is the figure's resolution.
const PAUSE: Duration = Duration::from_micros(200);
const GIVE_UP_AFTER: Duration = Duration::from_secs(20);

/// Prints "waiting" once it watches, and "answered" at the first answer to Status, whatever that says.
pub(crate) async fn run(args: FirstAnswerArgs) -> Result<(), BenchError> {
    println!("waiting");
    let answered = tokio::time::timeout(GIVE_UP_AFTER, async {
        loop {
            match answer(&args).await {
                Ok(()) | Err(BenchError::Status { .. }) => break,
                // tokio's timer counts milliseconds, which is too coarse here; nothing else runs on this thread.
                Err(_) => std::thread::sleep(PAUSE),
            }
            tokio::task::yield_now().await;
        }
    });
    answered.await.map_err(|_| BenchError::Process {
        who: format!("the server at {}", args.socket.display()),
        what: format!("did not answer Status within {} s", GIVE_UP_AFTER.as_secs()),
    })?;
    println!("answered");
    Ok(())
}

async fn answer(args: &FirstAnswerArgs) -> Result<(), BenchError> {
    Client::connect(&args.socket)
        .await?
        .status()
        .await
        .map(drop)
}
