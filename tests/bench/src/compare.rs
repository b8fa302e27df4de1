//! The whole comparison: starts the servers, measures every row of every one in rounds, then the bad day and the start.
//!
//! All servers stay up and idle while one is driven. The rounds interleave them, and each round begins with another one,
//! so that whatever else the machine does falls on all alike; a row's figures are the medians over the rounds.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{KmsArgs, Op, Who};
use crate::error::BenchError;
use crate::process::{Server, busy_percent, cannot_start, own_program};
use crate::report::{self, Figures, Report, Row};
use crate::samples::{Summary, median};

const CONCURRENCIES: [u16; 2] = [1, 16];
const STARTS: usize = 10;
/// Decrypts that wait for the hanging module while Status is asked: a kube-apiserver that starts has about so many.
const UNANSWERED: u16 = 16;

pub(crate) async fn run(args: KmsArgs) -> Result<(), BenchError> {
    let handler = |kind| {
        signal(kind).map_err(|source| BenchError::Io {
            doing: "watch for signals",
            source,
        })
    };
    let (mut interrupt, mut terminate) = (
        handler(SignalKind::interrupt())?,
        handler(SignalKind::terminate())?,
    );
    // Dropping the comparison kills what it started.
    let report = tokio::select! {
        report = compare(&args) => report?,
        _ = interrupt.recv() => return Err(BenchError::Interrupted),
        _ = terminate.recv() => return Err(BenchError::Interrupted),
    };
    print!("{report}");
    if let Some(file) = &args.json {
        std::fs::write(file, report.json()).map_err(|source| BenchError::File {
            doing: "write",
            path: file.clone(),
            source,
        })?;
    }
    Ok(())
}

async fn compare(args: &KmsArgs) -> Result<Report, BenchError> {
    let machine = report::machine();
    let busy_before = busy_percent().await;
    let whos: Vec<Who> = Who::ALL
        .into_iter()
        .filter(|who| args.who.is_empty() || args.who.contains(who))
        .collect();
    let mut servers = Vec::new();
    for &who in &whos {
        if let Some((command, socket)) = server(args, who)? {
            servers.push((who, start(args, who, command, &socket).await?));
        }
    }

    let figures = rounds(args, &whos).await?;

    let mut report = Report {
        machine,
        busy_percent: busy_before.max(busy_percent().await),
        figures,
        status_hung: None,
        start_ms: None,
        memory_mb: None,
    };
    if let Some(at) = servers.iter().position(|(who, _)| *who == Who::Hsmd) {
        let (_, hsmd) = servers.swap_remove(at);
        drop(servers);
        report.memory_mb = hsmd.peak_memory_mb();
        eprintln!("Status while the module hangs ...");
        report.status_hung = Some(while_hung(args, &hsmd).await?);
        hsmd.stop().await?;
        eprintln!("{STARTS} starts ...");
        report.start_ms = Some(starts(args).await?);
    }
    Ok(report)
}

async fn rounds(args: &KmsArgs, whos: &[Who]) -> Result<Figures, BenchError> {
    let mut runs: Vec<(Row, Vec<Summary>)> = Vec::new();
    for round in 0..args.rounds {
        for op in [Op::Decrypt, Op::Encrypt, Op::Status] {
            for concurrency in CONCURRENCIES {
                eprint!(
                    "round {} of {}  {:<7} c{concurrency:<3}",
                    round + 1,
                    args.rounds,
                    op.name()
                );
                for at in 0..whos.len() {
                    let who = whos[(at + round as usize) % whos.len()];
                    if who == Who::Raw && op == Op::Status {
                        continue;
                    }
                    let summary = measure(args, who, op, concurrency).await?;
                    eprint!(
                        "  {} {:.1} us {:.0}/s",
                        who.name(),
                        summary.p50_us,
                        summary.rps
                    );
                    let row = Row {
                        who,
                        op,
                        concurrency,
                    };
                    match runs.iter_mut().find(|(known, _)| *known == row) {
                        Some((_, rounds)) => rounds.push(summary),
                        None => runs.push((row, vec![summary])),
                    }
                }
                eprintln!();
            }
        }
    }
    Ok(Figures::new(
        runs.into_iter()
            .map(|(row, rounds)| (row, Summary::median(&rounds))),
    ))
}

/// How a server is started and where it listens; the module by itself is no server.
fn server(args: &KmsArgs, who: Who) -> Result<Option<(Command, PathBuf)>, BenchError> {
    let missing = |what| BenchError::Process {
        who: who.name().to_owned(),
        what,
    };
    Ok(match who {
        Who::Raw => None,
        Who::Echo => {
            let socket = socket(args, who)?;
            let mut command = own_program()?;
            command.arg("echo").arg("--socket").arg(&socket);
            Some((command, socket))
        }
        Who::Hsmd => {
            let (Some(program), Some(config)) = (&args.hsmd, &args.hsmd_config) else {
                return Err(missing(
                    "is to be measured, but --hsmd or --hsmd-config is absent".to_owned(),
                ));
            };
            let mut command = Command::new(program);
            command.arg("run").arg("--config").arg(config);
            Some((command, socket(args, who)?))
        }
        Who::Peer => {
            let Some(program) = &args.peer else {
                return Err(missing(
                    "is to be measured, but --peer is absent".to_owned(),
                ));
            };
            let socket = socket(args, who)?;
            let mut command = Command::new(program);
            command
                .arg("--socket")
                .arg(&socket)
                .arg("--module")
                .arg(&args.key.module);
            command.args([
                "--token-label",
                &args.key.token_label,
                "--key-label",
                &args.key.key_label,
            ]);
            command.arg("--pin-file").arg(&args.key.pin_file);
            Some((command, socket))
        }
    })
}

fn socket(args: &KmsArgs, who: Who) -> Result<PathBuf, BenchError> {
    match who {
        Who::Hsmd => args.hsmd_socket.clone().ok_or_else(|| BenchError::Process {
            who: who.name().to_owned(),
            what: "is to be measured, but --hsmd-socket is absent".to_owned(),
        }),
        _ => Ok(args.folder.join(format!("{}.sock", who.name()))),
    }
}

async fn start(
    args: &KmsArgs,
    who: Who,
    command: Command,
    socket: &Path,
) -> Result<Server, BenchError> {
    let log = args.folder.join(format!("{}.log", who.name()));
    let mut server = Server::start(who.name(), command, &log)?;
    server.listening(socket).await?;
    if who != Who::Hsmd {
        // hsmd's configuration names the owner; the others know no caller.
        args.caller.own(socket)?;
    }
    Ok(server)
}

async fn measure(
    args: &KmsArgs,
    who: Who,
    op: Op,
    concurrency: u16,
) -> Result<Summary, BenchError> {
    let mut command = match who {
        Who::Raw => raw(args)?,
        _ => caller(args, "load", &socket(args, who)?)?,
    };
    row(&mut command, op, concurrency, args.seconds);
    let mut driver = Driver::start(who, command)?;
    // Warm-up, envelopes and a server that is still starting; past that something hangs.
    let limit = Duration::from_secs_f64(args.seconds) + Duration::from_secs(60);
    driver.summary(limit).await
}

fn raw(args: &KmsArgs) -> Result<Command, BenchError> {
    let mut command = own_program()?;
    command
        .arg("raw")
        .arg("--module")
        .arg(&args.key.module)
        .arg("--pin-file")
        .arg(&args.key.pin_file);
    command.args([
        "--token-label",
        &args.key.token_label,
        "--key-label",
        &args.key.key_label,
    ]);
    Ok(command)
}

fn caller(args: &KmsArgs, subcommand: &str, socket: &Path) -> Result<Command, BenchError> {
    let mut command = own_program()?;
    command.arg(subcommand).arg("--socket").arg(socket);
    args.caller.pass_on(&mut command);
    Ok(command)
}

fn row(command: &mut Command, op: Op, concurrency: u16, seconds: f64) {
    command.args(["--op", op.name(), "--concurrency", &concurrency.to_string()]);
    command.args(["--seconds", &seconds.to_string()]);
}

/// Status while every process of the module host is stopped, and each new one that hsmd puts in its place too.
async fn while_hung(args: &KmsArgs, hsmd: &Server) -> Result<Summary, BenchError> {
    let mut command = caller(args, "load", &socket(args, Who::Hsmd)?)?;
    row(&mut command, Op::Status, 1, args.seconds);
    command.args(["--while-hung", &UNANSWERED.to_string()]);
    let mut driver = Driver::start(Who::Hsmd, command)?;
    let limit = Duration::from_secs_f64(args.seconds) + Duration::from_secs(60);
    driver.expect("ready", limit).await?;
    if stop_all(hsmd, Signal::SIGSTOP) == 0 {
        return Err(hsmd.did("has no module host that could hang".to_owned()));
    }
    driver.go().await?;
    let keep_stopped = async {
        loop {
            stop_all(hsmd, Signal::SIGSTOP);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let summary = tokio::select! {
        summary = driver.summary(limit) => summary,
        () = keep_stopped => unreachable!("an endless loop"),
    };
    stop_all(hsmd, Signal::SIGCONT);
    summary
}

/// Sends every process under hsmd a signal; how many there were.
fn stop_all(hsmd: &Server, signal: Signal) -> usize {
    // One that ended meanwhile needs none.
    hsmd.descendants()
        .into_iter()
        .filter(|pid| kill(*pid, signal).is_ok())
        .count()
}

/// From before exec until the caller has an answer to Status: the median of [`STARTS`], in milliseconds.
async fn starts(args: &KmsArgs) -> Result<f64, BenchError> {
    let mut took = Vec::with_capacity(STARTS);
    for _ in 0..STARTS {
        let limit = Duration::from_secs(30);
        let (command, socket) =
            server(args, Who::Hsmd)?.unwrap_or((own_program()?, PathBuf::new()));
        let mut watcher = Driver::start(Who::Hsmd, caller(args, "first-answer", &socket)?)?;
        watcher.expect("waiting", limit).await?;
        let begun = Instant::now();
        let hsmd = Server::start(Who::Hsmd.name(), command, &args.folder.join("hsmd.log"))?;
        watcher.expect("answered", limit).await?;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        hsmd.stop().await?;
    }
    Ok(median(took.into_iter()))
}

/// A process that measures: says in lines on its output how far it is, and at last a summary.
struct Driver {
    who: Who,
    child: Child,
    input: ChildStdin,
    output: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Driver {
    fn start(who: Who, mut command: Command) -> Result<Self, BenchError> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .map_err(|source| cannot_start(&command, source))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) =
            pipes.ok_or_else(|| cannot_start(&command, io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self {
            who,
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    async fn expect(&mut self, word: &str, limit: Duration) -> Result<(), BenchError> {
        let line = self.line(limit).await?;
        if line == word {
            Ok(())
        } else {
            Err(self.failed(format!("said \"{line}\" instead of \"{word}\"")))
        }
    }

    async fn go(&mut self) -> Result<(), BenchError> {
        let written = self.input.write_all(b"go\n").await;
        written.map_err(|source| BenchError::Io {
            doing: "give the load generator its sign",
            source,
        })
    }

    async fn summary(&mut self, limit: Duration) -> Result<Summary, BenchError> {
        let line = self.line(limit).await?;
        serde_json::from_str(&line)
            .map_err(|_| self.failed(format!("said \"{line}\" instead of figures")))
    }

    async fn line(&mut self, limit: Duration) -> Result<String, BenchError> {
        match tokio::time::timeout(limit, self.output.next_line()).await {
            Ok(Ok(Some(line))) => Ok(line),
            Ok(_) => {
                // It has said why on standard error, which is ours.
                let status = self.child.wait().await;
                let status =
                    status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(self.failed(format!("failed: {status}")))
            }
            Err(_) => Err(self.failed(format!("took longer than {} s", limit.as_secs()))),
        }
    }

    fn failed(&self, what: String) -> BenchError {
        BenchError::Process {
            who: format!("the measurement of {}", self.who.name()),
            what,
        }
    }
}
