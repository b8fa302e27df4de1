//! Keeps one token served: starts its host, opens the token, replaces a host that is lost.
//!
//! *Expected flow:* Starting → Up → (host lost) Starting → Up …; a try that fails → Down, tries with
//! growing pauses → Up; a refused PIN → Latched, and nothing more.
//!
//! *Guarantees:* two hosts of one token never run side by side. Each host is a fresh process, so
//! each try begins with `C_Initialize`, the only point at which a module looks at its slots anew. One
//! log line for each change, none for each try.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hsm_wire::fault::FaultKind;
use hsm_wire::host::{Answer, Description, LatchNote, Open, Request, Response};
use hsm_wire::secret::Secret;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroize;

use crate::channel::{Buffer, Channel};
use crate::config::Config;
use crate::dispatch::long_timeout;
use crate::host::{Host, Hosts};
use crate::ladder::Ladder;
use crate::login::Login;
use crate::shared::{Lost, Shared, clean};
use crate::token::State;

/// A start takes milliseconds, unless an earlier host has not ended.
const START_WAIT: Duration = Duration::from_secs(5);
/// A killed process ends at once unless the kernel holds it.
const END_WAIT: Duration = Duration::from_secs(2);
/// A closed channel means that the process is about to end and to say how.
const STATUS_WAIT: Duration = Duration::from_millis(500);
/// A host whose channel was closed may log out and finalise: sessions that are left open count
/// against the limit of a network HSM. The host gives the module 1 s, and the daemon has 5 s to end.
const STOP_WAIT: Duration = Duration::from_millis(1500);

/// Runs until the token is stopped, and says when everything has ended.
pub(crate) async fn supervise(
    shared: Arc<Shared>,
    config: Config,
    hosts: Hosts,
    mut stop: watch::Receiver<bool>,
    done: watch::Sender<bool>,
) {
    let login = Login::new(&config);
    let mut supervisor = Supervisor {
        shared,
        config,
        hosts,
        login,
        served: false,
    };
    supervisor.run(&mut stop).await;
    let state = |since| State::Down {
        reason: STOPPED.into(),
        since,
    };
    supervisor.shared.refuse(state, STOPPED);
    drop(supervisor);
    done.send_replace(true);
}

const STOPPED: &str = "it was stopped";

struct Supervisor {
    shared: Arc<Shared>,
    config: Config,
    hosts: Hosts,
    login: Login,
    served: bool,
}

/// An open token and the process behind it.
struct Opened {
    host: Host,
    channel: Channel,
    description: Description,
}

/// Why a try to open the token failed.
pub(crate) enum Failed {
    /// It is tried again.
    Down(String),
    /// It is not.
    Latched(String),
}

impl Supervisor {
    async fn run(&mut self, stop: &mut watch::Receiver<bool>) {
        let mut ladder = Ladder::default();
        loop {
            let tried = Instant::now();
            let opened = tokio::select! {
                () = stopped(stop) => return,
                opened = self.open() => opened,
            };
            match opened {
                Ok(opened) => {
                    let up = Instant::now();
                    let Some(reason) = self.serve(opened, stop).await else {
                        return;
                    };
                    match reason {
                        Failed::Latched(reason) => return self.stay_latched(&reason, stop).await,
                        Failed::Down(reason) => {
                            if ladder.lost(up, Instant::now()) {
                                continue;
                            }
                            self.down(&reason);
                        }
                    }
                }
                Err(Failed::Latched(reason)) => return self.stay_latched(&reason, stop).await,
                Err(Failed::Down(reason)) => self.down(&reason),
            }
            let pause = ladder.pause(tried, Instant::now());
            tokio::select! {
                () = stopped(stop) => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// One try: a fresh host, the PIN, the token, its keys.
    async fn open(&mut self) -> Result<Opened, Failed> {
        let (pin, latched) = self.login.prepare().await?;
        let started = timeout(START_WAIT, self.hosts.start()).await;
        let (mut host, fd) = started
            .unwrap_or_else(|_| {
                Err(io::Error::other(
                    "the one before was killed and has not ended",
                ))
            })
            .map_err(|e| Failed::Down(format!("the module host cannot be started: {e}")))?;
        let result = self.converse(&mut host, fd, pin, latched).await;
        match result {
            Ok((channel, description)) => Ok(Opened {
                host,
                channel,
                description,
            }),
            Err(failed) => {
                host.kill();
                // One that does not end holds up the next start, which then says so.
                let _ = timeout(END_WAIT, host.ended()).await;
                Err(failed)
            }
        }
    }

    async fn converse(
        &mut self,
        host: &mut Host,
        fd: OwnedFd,
        pin: Option<Secret>,
        latched: Vec<LatchNote>,
    ) -> Result<(Channel, Description), Failed> {
        let channel = Channel::new(fd)
            .map_err(|e| Failed::Down(format!("the channel to the module host failed: {e}")))?;
        let open = Request::Open(Open {
            module: self.config.module.to_string_lossy().into_owned(),
            token: self.config.uri.clone(),
            sessions: self.config.sessions,
            pin,
            pin_generation: self.config.pin_generation,
            latched,
        });
        let limit = long_timeout(self.config.call_timeout);
        let answers = timeout(limit, self.ask_both(&channel, open));
        let lost = match answers.await {
            Ok(Ok(description)) => return Ok((channel, description)),
            Ok(Err(lost)) => lost,
            Err(_) => Lost::Hopeless(format!(
                "the module did not open the token within {} s",
                limit.as_secs()
            )),
        };
        Err(self
            .failed(lost, host, "before it had opened the token")
            .await)
    }

    async fn ask_both(&mut self, channel: &Channel, open: Request) -> Result<Description, Lost> {
        let Answer::Opened(token) = self.ask(channel, 0, open).await? else {
            return Err(Lost::Nonsense(
                "another answer than that the token is open".into(),
            ));
        };
        self.login.token_is(token.serial);
        let Answer::Described(description) = self.ask(channel, 1, Request::Describe).await? else {
            return Err(Lost::Nonsense(
                "another answer than the token's description".into(),
            ));
        };
        Ok(description)
    }

    async fn ask(&self, channel: &Channel, id: u64, request: Request) -> Result<Answer, Lost> {
        let packet = request.encode(id);
        // The PIN goes now, not when the answer is there.
        drop(request);
        channel.send(&packet).await.map_err(|_| Lost::Closed)?;
        drop(packet);
        let response = receive(channel, &mut Buffer::new()).await?;
        self.shared.count_recovery(response.recovery);
        if response.id != id {
            return Err(Lost::Nonsense("an answer to nothing that was asked".into()));
        }
        response.outcome.map_err(|fault| match clean(fault) {
            fault if fault.kind.is_latched() => Lost::Latched(fault),
            fault => Lost::Token(fault),
        })
    }

    /// Serves until the host is lost, and says why; none when the token was stopped.
    async fn serve(&mut self, opened: Opened, stop: &mut watch::Receiver<bool>) -> Option<Failed> {
        let Opened {
            mut host,
            channel,
            description,
        } = opened;
        let channel = Arc::new(channel);
        if self.served {
            self.shared.count(|stats| stats.respawned += 1);
        }
        self.served = true;
        tracing::info!(
            token = self.shared.name,
            host_pid = host.pid(),
            serial = crate::text::printable(&description.token.serial),
            keys = description.keys.len(),
            "The token is up."
        );
        self.shared
            .up(Arc::clone(&channel), description, host.pid());

        // A task of its own: an answer then wakes this one and nothing else.
        let reader = tokio::spawn(read_answers(Arc::clone(&self.shared), Arc::clone(&channel)));
        let mut reader = Aborting(reader);
        let lost = tokio::select! {
            () = stopped(stop) => None,
            lost = reader.ended() => Some(lost),
            lost = look_for_stuck(&self.shared, self.config.call_timeout) => Some(lost),
            () = self.shared.send_when_writable(&channel) => None,
        };
        let Some(lost) = lost else {
            let state = |since| State::Down {
                reason: STOPPED.into(),
                since,
            };
            self.shared.refuse(state, STOPPED);
            // An answer that is still on its way is nobody's now.
            drop(reader);
            channel.close();
            if timeout(STOP_WAIT, host.ended()).await.is_err() {
                host.kill();
                let _ = timeout(END_WAIT, host.ended()).await;
            }
            return None;
        };
        self.shared.stop_sending();
        let failed = self.failed(lost, &mut host, "while it served").await;
        if let Failed::Down(reason) = &failed {
            self.shared.host_lost(reason);
            tracing::warn!(
                token = self.shared.name,
                host_pid = host.pid(),
                reason,
                "The module host is lost."
            );
        }
        channel.close();
        host.kill();
        let _ = timeout(END_WAIT, host.ended()).await;
        Some(failed)
    }

    /// What a loss means, with the reason in words; counted, and noted if the PIN was refused.
    async fn failed(&mut self, lost: Lost, host: &mut Host, when: &str) -> Failed {
        match lost {
            Lost::Closed => {
                self.shared.count(|stats| stats.crashed += 1);
                let how = timeout(STATUS_WAIT, host.ended()).await;
                let how = how.unwrap_or_else(|_| "closed its channel".into());
                Failed::Down(format!("the module host {how} {when}"))
            }
            Lost::Nonsense(what) => {
                self.shared.count(|stats| stats.crashed += 1);
                Failed::Down(format!("the module host sent {what}"))
            }
            Lost::Hopeless(reason) => Failed::Down(reason),
            Lost::Token(fault) => Failed::Down(fault.to_string()),
            // No login was tried, so that a PIN that comes later may be tried.
            Lost::Latched(fault) if fault.kind == FaultKind::PinMissing => {
                Failed::Down(fault.to_string())
            }
            Lost::Latched(fault) => {
                self.login.note(&fault).await;
                Failed::Latched(fault.to_string())
            }
        }
    }

    fn down(&self, reason: &str) {
        let reason = reason.to_owned();
        let was_down = matches!(&*self.shared.state().borrow(), State::Down { .. });
        let state = |since| State::Down {
            reason: reason.clone(),
            since,
        };
        let changed = self.shared.refuse(state, &reason);
        if !was_down {
            self.shared.count(|stats| stats.down += 1);
        }
        if changed {
            tracing::error!(token = self.shared.name, reason, "The token is down.");
        }
    }

    async fn stay_latched(&self, reason: &str, stop: &mut watch::Receiver<bool>) {
        let reason = format!(
            "{reason}; no login is tried until pin.generation is above {}",
            self.config.pin_generation
        );
        let state = |_| State::Latched {
            reason: reason.clone(),
            since: SystemTime::now(),
        };
        self.shared.refuse(state, &reason);
        tracing::error!(
            token = self.shared.name,
            reason,
            "The token's PIN is latched."
        );
        stopped(stop).await;
    }
}

/// Returns when the token is stopped, or when nobody holds it any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error says that the sender is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn receive(channel: &Channel, buffer: &mut Buffer) -> Result<Response, Lost> {
    let packet = match channel.recv(buffer).await {
        Ok(Some(packet)) => packet,
        Ok(None) => return Err(Lost::Closed),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(Lost::Nonsense(e.to_string()));
        }
        Err(_) => return Err(Lost::Closed),
    };
    let response = Response::decode(packet);
    packet.zeroize();
    response.map_err(|e| Lost::Nonsense(format!("a malformed message: {e}")))
}

async fn read_answers(shared: Arc<Shared>, channel: Arc<Channel>) -> Lost {
    let mut buffer = Buffer::new();
    loop {
        let taken = receive(&channel, &mut buffer).await;
        if let Err(lost) = taken.and_then(|response| shared.answered(response)) {
            return lost;
        }
    }
}

/// Looks eight times per call timeout, so that one is found at most an eighth late.
async fn look_for_stuck(shared: &Shared, call_timeout: Duration) -> Lost {
    let period = (call_timeout / 8).max(Duration::from_millis(10));
    loop {
        let slept = Instant::now();
        sleep(period).await;
        // A daemon that was not running itself (a stopped process, a paused machine) has answers to
        // read first: time that it did not see is no time that the module took.
        if slept.elapsed() >= 3 * period {
            continue;
        }
        if let Err(lost) = shared.look_for_stuck() {
            return lost;
        }
    }
}

/// A task that does not outlive who waits for it.
struct Aborting(tokio::task::JoinHandle<Lost>);

impl Aborting {
    async fn ended(&mut self) -> Lost {
        match (&mut self.0).await {
            Ok(lost) => lost,
            Err(e) => Lost::Nonsense(format!("an answer that stopped its reader: {e}")),
        }
    }
}

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}
