//! What callers and supervisor share: the queue, the host that serves now, the state shown outside.
//!
//! The lock is held for moments and never across an await. A caller sends its own packet when the
//! host has room, and the task that reads answers sends the next one: on the way of an operation
//! there is no task beside these two.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, Description, KeyRef, Recovery, Request, Response};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use crate::channel::Channel;
use crate::dispatch::{Dispatch, Operation, Reply};
use crate::error::TokenError;
use crate::text::printable;
use crate::token::{State, Stats};

/// See the module's text.
pub(crate) struct Shared {
    pub(crate) name: String,
    core: Mutex<Core>,
    state: watch::Sender<State>,
    /// Told when the channel was full; [`Shared::send_when_writable`] waits for it.
    full: Notify,
}

struct Core {
    phase: Phase,
    dispatch: Dispatch,
    last_id: u64,
    stats: Stats,
    /// The channel was full and nobody sends until it is not.
    blocked: bool,
}

enum Phase {
    /// A host is on its way; operations wait in the queue.
    Waiting,
    Serving {
        channel: Arc<Channel>,
        description: Arc<Description>,
        host_pid: Option<u32>,
    },
    /// Operations are answered at once with this reason.
    Refusing(String),
}

/// Why a host is of no more use.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The channel was closed.
    Closed,
    /// It sent what no host of ours sends.
    Nonsense(String),
    /// It hangs.
    Hopeless(String),
    /// It says that it has lost the token.
    Token(Fault),
    /// It says that the PIN is refused.
    Latched(Fault),
}

impl Shared {
    pub(crate) fn new(name: String, dispatch: Dispatch) -> Self {
        Self {
            name,
            core: Mutex::new(Core {
                phase: Phase::Waiting,
                dispatch,
                last_id: 0,
                stats: Stats::default(),
                blocked: false,
            }),
            state: watch::Sender::new(State::Starting),
            full: Notify::new(),
        }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.core().stats
    }

    /// Counts something.
    pub(crate) fn count(&self, what: impl FnOnce(&mut Stats)) {
        what(&mut self.core().stats);
    }

    /// Counts the steps that a host took before it answered.
    pub(crate) fn count_recovery(&self, taken: Recovery) {
        self.core().stats.add(taken);
    }

    /// Queues an operation and sends it at once if the host has room. Its id, for
    /// [`Self::abandon`].
    pub(crate) fn submit(
        &self,
        request: Request,
        deadline: Instant,
        reply: oneshot::Sender<Reply>,
    ) -> Result<u64, TokenError> {
        let now = Instant::now();
        let mut core = self.core();
        if let Phase::Refusing(reason) = &core.phase {
            return Err(self.down(reason));
        }
        if deadline <= now {
            return Err(TokenError::Deadline {
                token: self.name.clone(),
            });
        }
        core.last_id += 1;
        let id = core.last_id;
        let operation = Operation {
            id,
            request,
            deadline,
            resent: false,
            reply,
        };
        core.dispatch.admit(operation, now).map_err(|overload| {
            let token = self.name.clone();
            TokenError::Overloaded {
                token,
                waiting: overload.waiting,
                expected: overload.expected,
            }
        })?;
        self.send_waiting(&mut core, now);
        Ok(id)
    }

    /// Looks for the host's next answer for a moment, if that is worth it. It is taken from the
    /// channel by who reads from it, as always; but nobody has to be woken for it.
    pub(crate) fn look_for_answer(&self) {
        let core = self.core();
        let (Phase::Serving { channel, .. }, Some(look)) =
            (&core.phase, core.dispatch.worth_looking())
        else {
            return;
        };
        let channel = Arc::clone(channel);
        drop(core);
        let until = std::time::Instant::now() + look;
        while !channel.has_packet() && std::time::Instant::now() < until {
            // Whoever would answer may need this CPU.
            std::thread::yield_now();
        }
    }

    /// The caller of an operation is gone.
    pub(crate) fn abandon(&self, id: u64) {
        self.core().dispatch.abandon(id);
    }

    /// Takes what a host answered. An error means that it is of no more use, and that no more goes
    /// to it.
    pub(crate) fn answered(&self, response: Response) -> Result<(), Lost> {
        let now = Instant::now();
        let mut core = self.core();
        let lost = self.settle(&mut core, response, now);
        match lost {
            Ok(()) => self.send_waiting(&mut core, now),
            Err(_) => core.stop_sending(),
        }
        lost
    }

    fn settle(&self, core: &mut Core, response: Response, now: Instant) -> Result<(), Lost> {
        core.stats.add(response.recovery);
        let Some(operation) = core.dispatch.answer(response.id, now) else {
            return Err(Lost::Nonsense("an answer to nothing that was asked".into()));
        };
        let fault = match response.outcome {
            Ok(answer) if fits(&operation.request, &answer) => {
                // A caller that is gone does not need it.
                let _ = operation.reply.send(Ok(answer));
                return Ok(());
            }
            Ok(_) => {
                let what = "an answer of another kind than the question";
                self.hand_back(
                    core,
                    operation,
                    self.down(&format!("the module host sent {what}")),
                );
                return Err(Lost::Nonsense(what.into()));
            }
            Err(fault) => clean(fault),
        };
        let error = TokenError::Fault {
            token: self.name.clone(),
            fault: fault.clone(),
        };
        if core.is_lost(&operation.request, fault.kind) {
            self.hand_back(core, operation, error);
            return Err(Lost::Token(fault));
        }
        let _ = operation.reply.send(Err(error));
        if fault.kind.is_latched() {
            Err(Lost::Latched(fault))
        } else {
            Ok(())
        }
    }

    // The next host may do better; if this was that next one, the caller learns the error.
    fn hand_back(&self, core: &mut Core, mut operation: Operation, error: TokenError) {
        if operation.resent {
            let _ = operation.reply.send(Err(error));
        } else {
            operation.resent = true;
            core.dispatch.put_back(operation);
        }
    }

    /// Looks for operations that hang. An error means that the host is of no more use.
    pub(crate) fn look_for_stuck(&self) -> Result<(), Lost> {
        let mut core = self.core();
        let found = core.dispatch.mark_stuck(Instant::now());
        core.stats.stuck += found.new;
        if found.new > 0 {
            tracing::warn!(
                token = self.name,
                operations = found.new,
                "Operations hang in the module."
            );
        }
        found
            .hopeless
            .map_or(Ok(()), |reason| Err(Lost::Hopeless(reason)))
    }

    /// Sends what waits each time the channel was full and has room again. Never ends.
    pub(crate) async fn send_when_writable(&self, channel: &Channel) {
        loop {
            self.full.notified().await;
            // A broken channel is seen by who reads from it.
            if channel.writable().await.is_err() {
                continue;
            }
            let mut core = self.core();
            core.blocked = false;
            self.send_waiting(&mut core, Instant::now());
        }
    }

    fn send_waiting(&self, core: &mut Core, now: Instant) {
        let Phase::Serving { channel, .. } = &core.phase else {
            return;
        };
        while !core.blocked
            && let Some(operation) = core.dispatch.next(now)
        {
            match channel.try_send(&operation.request.encode(operation.id)) {
                Ok(()) => core.dispatch.sent(now),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    core.blocked = true;
                    self.full.notify_one();
                }
                // The host is gone, and who reads from it will see that too. What was not sent
                // waits for the next one.
                Err(_) => break,
            }
        }
    }

    /// A host serves from now on.
    pub(crate) fn up(&self, channel: Arc<Channel>, description: Description, pid: Option<u32>) {
        let description = Arc::new(description);
        let mut core = self.core();
        core.blocked = false;
        core.phase = Phase::Serving {
            channel,
            description: Arc::clone(&description),
            host_pid: pid,
        };
        self.send_waiting(&mut core, Instant::now());
        drop(core);
        self.state.send_replace(State::Up {
            description,
            host_pid: pid,
        });
    }

    /// A host that serves found something else on the token than before.
    pub(crate) fn described(&self, found: Description) {
        let mut core = self.core();
        let Phase::Serving {
            description,
            host_pid,
            ..
        } = &mut core.phase
        else {
            return;
        };
        *description = Arc::new(found);
        let state = State::Up {
            description: Arc::clone(description),
            host_pid: *host_pid,
        };
        self.state.send_replace(state);
    }

    /// Nothing more goes to the host; operations wait for the next one.
    pub(crate) fn stop_sending(&self) {
        self.core().stop_sending();
    }

    /// The host is lost. What it had waits for the next one; what was sent twice fails.
    pub(crate) fn host_lost(&self, reason: &str) {
        let mut core = self.core();
        core.stop_sending();
        for operation in core.dispatch.host_lost(Instant::now()) {
            let reason = format!("two module hosts were lost over this operation: {reason}");
            let _ = operation.reply.send(Err(self.down(&reason)));
        }
        drop(core);
        self.state.send_replace(State::Starting);
    }

    /// Answers everything at once, and shows `state` unless the one shown says the same; whether it
    /// did not.
    pub(crate) fn refuse(&self, state: impl FnOnce(SystemTime) -> State, reason: &str) -> bool {
        let mut core = self.core();
        let mut operations: Vec<Operation> = core.dispatch.host_lost(Instant::now());
        operations.extend(core.dispatch.drain());
        for operation in operations {
            let _ = operation.reply.send(Err(self.down(reason)));
        }
        let same = matches!(&core.phase, Phase::Refusing(old) if old == reason);
        let since = match &*self.state.borrow() {
            State::Down { since, .. } => *since,
            _ => SystemTime::now(),
        };
        core.phase = Phase::Refusing(reason.to_owned());
        drop(core);
        if !same {
            self.state.send_replace(state(since));
        }
        !same
    }

    pub(crate) fn down(&self, reason: &str) -> TokenError {
        TokenError::Down {
            token: self.name.clone(),
            reason: reason.to_owned(),
        }
    }
}

impl Core {
    fn stop_sending(&mut self) {
        if let Phase::Serving { .. } = self.phase {
            self.phase = Phase::Waiting;
        }
    }

    /// Whether this fault means that the host is of no more use. A key that was there and is gone
    /// is a lost token, not an empty one: SoftHSM, its folder gone, goes on and finds nothing.
    fn is_lost(&self, request: &Request, kind: FaultKind) -> bool {
        let described = |key: &KeyRef| match &self.phase {
            Phase::Serving { description, .. } => {
                description.keys.iter().any(|info| info.key == *key)
            }
            _ => false,
        };
        match (kind, key_of(request)) {
            (FaultKind::KeyNotFound | FaultKind::KeyChanged, Some(key)) => described(key),
            _ => kind.is_token_lost(),
        }
    }
}

impl Stats {
    fn add(&mut self, taken: Recovery) {
        self.retried += u64::from(taken.retried);
        self.relogin += u64::from(taken.relogin);
        self.reinit += u64::from(taken.reinit);
    }
}

fn key_of(request: &Request) -> Option<&KeyRef> {
    match request {
        Request::Seal { key, .. } | Request::Unseal { key, .. } | Request::Probe { key, .. } => {
            Some(key)
        }
        Request::Open(_) | Request::Describe => None,
    }
}

/// Whether this can be the answer to that. The host runs a vendor's code, which may lie.
fn fits(request: &Request, answer: &Answer) -> bool {
    match (request, answer) {
        (Request::Unseal { plaintext_len, .. }, Answer::Unsealed(plaintext)) => {
            plaintext.len() == *plaintext_len as usize
        }
        (Request::Seal { plaintext, .. }, Answer::Sealed(sealed)) => sealed.len() > plaintext.len(),
        (Request::Open(_), Answer::Opened(_))
        | (Request::Describe, Answer::Described(_))
        | (Request::Probe { .. }, Answer::Probed) => true,
        _ => false,
    }
}

/// The fault with texts that are fit for a log. The serial number stays: it is compared, not shown.
pub(crate) fn clean(fault: Fault) -> Fault {
    Fault {
        function: printable(&fault.function),
        detail: printable(&fault.detail),
        ..fault
    }
}
