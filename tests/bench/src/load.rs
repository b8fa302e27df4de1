//! The load generator: so many requests in flight over one connection, each answer checked.
//!
//! hsmd lets Decrypts of one ciphertext share an operation while they are in flight, so [`ENVELOPES`] different ones are
//! sealed first and used in turn: more than the concurrency, or a share of the requests would cost nothing.

use std::cell::Cell;
use std::io::{BufRead as _, Write as _};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::LocalSet;

use crate::args::{LoadArgs, Op};
use crate::client::Client;
use crate::error::BenchError;
use crate::messages::{DecryptRequest, EncryptRequest};
use crate::samples::Summary;

const ENVELOPES: usize = 256;
/// What kube-apiserver has sealed: a seed of 32 bytes.
const PLAINTEXT_LEN: usize = 32;
/// A server that was just started has a module to load and a login to make.
const READY_WITHIN: Duration = Duration::from_secs(20);
const WARM_UP: Duration = Duration::from_millis(500);

pub(crate) async fn run(args: LoadArgs) -> Result<(), BenchError> {
    let client = ready(&args.socket).await?;
    let work = Rc::new(Work::prepare(client, args.row.op, args.while_hung.is_some()).await?);
    let tasks = LocalSet::new();
    if let Some(unanswered) = args.while_hung {
        wait_for_go()?;
        for _ in 0..unanswered {
            let work = Rc::clone(&work);
            tasks.spawn_local(async move { drop(work.decrypt().await) });
        }
    }
    let summary = tasks
        .run_until(async {
            let concurrency = usize::from(args.row.concurrency);
            drive(&work, concurrency, WARM_UP).await?;
            drive(
                &work,
                concurrency,
                Duration::from_secs_f64(args.row.seconds),
            )
            .await
        })
        .await?;
    print_json(&summary)
}

/// Prints the one line that the comparison reads.
pub(crate) fn print_json(summary: &Summary) -> Result<(), BenchError> {
    let doing = "print the figures";
    let line = serde_json::to_string(summary).map_err(|error| BenchError::Io {
        doing,
        source: error.into(),
    })?;
    writeln!(std::io::stdout(), "{line}").map_err(|source| BenchError::Io { doing, source })
}

/// Connects, and waits until an Encrypt works.
async fn ready(socket: &Path) -> Result<Client, BenchError> {
    let begun = Instant::now();
    loop {
        let attempt = async {
            let client = Client::connect(socket).await?;
            client
                .encrypt(&EncryptRequest {
                    plaintext: vec![1; PLAINTEXT_LEN],
                    uid: "ready".into(),
                })
                .await?;
            Ok(client)
        };
        match attempt.await {
            Ok(client) => return Ok(client),
            Err(last) if begun.elapsed() > READY_WITHIN => {
                return Err(BenchError::NeverReady {
                    socket: socket.to_owned(),
                    seconds: READY_WITHIN.as_secs(),
                    last: Box::new(last),
                });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Tells the comparison that everything is prepared, and waits for its word.
fn wait_for_go() -> Result<(), BenchError> {
    let doing = "agree on the start with the comparison";
    println!("ready");
    std::io::stdin()
        .lock()
        .read_line(&mut String::new())
        .map_err(|source| BenchError::Io { doing, source })?;
    Ok(())
}

/// Keeps `concurrency` requests in flight for that long.
async fn drive(
    work: &Rc<Work>,
    concurrency: usize,
    length: Duration,
) -> Result<Summary, BenchError> {
    let begun = Instant::now();
    let end = begun + length;
    let workers: Vec<_> = (0..concurrency)
        .map(|_| {
            let work = Rc::clone(work);
            tokio::task::spawn_local(async move {
                let mut latencies = Vec::with_capacity(1 << 17);
                let mut now = Instant::now();
                while now < end {
                    work.once().await?;
                    let then = std::mem::replace(&mut now, Instant::now());
                    latencies.push(now - then);
                }
                Ok::<_, BenchError>(latencies)
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for worker in workers {
        let own = worker.await.map_err(|error| BenchError::Io {
            doing: "run a worker",
            source: error.into(),
        })?;
        latencies.append(&mut own?);
    }
    Ok(Summary::of(latencies, begun.elapsed()))
}

struct Work {
    client: Client,
    op: Op,
    any_answer: bool,
    next: Cell<usize>,
    plaintexts: Vec<EncryptRequest>,
    envelopes: Vec<DecryptRequest>,
}

impl Work {
    async fn prepare(client: Client, op: Op, any_answer: bool) -> Result<Self, BenchError> {
        let plaintexts: Vec<_> = (0..ENVELOPES)
            .map(|number| {
                let plaintext = (0..PLAINTEXT_LEN)
                    .map(|at| (number * 31 + at * 7) as u8)
                    .collect();
                EncryptRequest {
                    plaintext,
                    uid: format!("00000000-0000-4000-8000-{number:012}"),
                }
            })
            .collect();
        let mut envelopes = Vec::with_capacity(ENVELOPES);
        for request in &plaintexts {
            let sealed = client.encrypt(request).await?;
            envelopes.push(DecryptRequest {
                ciphertext: sealed.ciphertext,
                uid: request.uid.clone(),
                key_id: sealed.key_id,
                annotations: sealed.annotations,
            });
        }
        Ok(Self {
            client,
            op,
            any_answer,
            next: Cell::new(0),
            plaintexts,
            envelopes,
        })
    }

    /// One request and its answer, which must be the right one; while the module hangs, any answer.
    async fn once(&self) -> Result<(), BenchError> {
        let outcome = match self.op {
            Op::Decrypt => self.decrypt().await,
            Op::Encrypt => self
                .client
                .encrypt(&self.plaintexts[self.turn()])
                .await
                .map(drop),
            Op::Status => self.client.status().await.map(drop),
        };
        match outcome {
            Err(BenchError::Status { .. }) if self.any_answer => Ok(()),
            other => other,
        }
    }

    async fn decrypt(&self) -> Result<(), BenchError> {
        let turn = self.turn();
        let answer = self.client.decrypt(&self.envelopes[turn]).await?;
        if answer.plaintext != self.plaintexts[turn].plaintext {
            return Err(BenchError::WrongPlaintext { who: "the server" });
        }
        Ok(())
    }

    fn turn(&self) -> usize {
        let turn = self.next.get();
        self.next.set((turn + 1) % ENVELOPES);
        turn
    }
}
