//! The life of the host after it is locked in: open the token, then answer until the daemon goes.
//!
//! N session threads block in receive on the one socket, each with a session of its own. Two more
//! wait for the hang-up and nothing else, so that the process ends with the daemon also when every
//! session thread is stuck in the module: one cleans up, the other ends it if that takes too long.

use std::sync::{Barrier, OnceLock};
use std::thread;
use std::time::Duration;

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, Open, Recovery, Request, Response};
use nix::libc;

use crate::baton::{Baton, LOOK, QUICK, SHORT};
use crate::channel::{Channel, Packet, Received};
use crate::module::Threading;
use crate::session::Worker;
use crate::token::Token;

/// Vendor code is tested on the stack that threads get by default, which is the main thread's 8 MiB.
const STACK: usize = 8 * 1024 * 1024;
/// For the module's own clean-up when the daemon is gone.
const SHUT_DOWN: Duration = Duration::from_millis(500);

static CHANNEL: OnceLock<Channel> = OnceLock::new();
static TOKEN: OnceLock<Token> = OnceLock::new();
static BATON: OnceLock<Baton> = OnceLock::new();

/// Receives the first request, which must be Open.
pub(crate) fn receive_open(channel: &Channel) -> (u64, Open) {
    let mut packet = Packet::new();
    match receive(channel, &mut packet, Duration::ZERO) {
        Some((id, Request::Open(open))) => (id, open),
        Some((id, _)) => refuse(
            channel,
            id,
            Fault::new(FaultKind::BadRequest, "the first request must open a token"),
        ),
        None => leave(0),
    }
}

/// Answers with `fault`, and ends: the daemon starts a new host when it is time to try again.
pub(crate) fn refuse(channel: &Channel, id: u64, fault: Fault) -> ! {
    log!("{fault}");
    respond(channel, id, Err(fault));
    leave(1)
}

/// Opens the token, then serves until the daemon hangs up.
pub(crate) fn serve(channel: Channel, id: u64, open: Open) -> ! {
    let channel = CHANNEL.get_or_init(|| channel);
    watch_for_hang_up(channel);
    let sessions = open.sessions.clamp(1, 64);
    let token = match Token::open(open) {
        Ok(token) => TOKEN.get_or_init(|| token),
        Err(fault) => refuse(channel, id, fault),
    };
    let info = token.enter().info.clone();
    respond(channel, id, Ok(Answer::Opened(info)));
    let sessions = match token.threading {
        Threading::Parallel => sessions,
        Threading::Serial => {
            log!("the module cannot lock; one session thread only");
            1
        }
    };
    let baton = BATON.get_or_init(|| Baton::new(sessions.into()));
    // Without it a call that hangs holds up the others until the daemon ends this process; without
    // one of the threads below all is slower, not wrong.
    let _ = spawn("relief", move || baton.relieve());
    for n in 1..sessions {
        let _ = spawn(&format!("session {n}"), move || {
            work(channel, token, baton, n.into());
        });
    }
    work(channel, token, baton, 0)
}

/// Starts the two threads that end the process, and returns when both have.
///
/// They must be under way before any vendor code runs: a module that hangs while it is loaded holds
/// the dynamic linker's lock, and a thread takes that lock when it begins (to register destructors).
fn watch_for_hang_up(channel: &'static Channel) {
    static STARTED: Barrier = Barrier::new(3);
    let first = spawn("hang-up", move || {
        STARTED.wait();
        channel.wait_for_hang_up();
        // C_Finalize frees sessions that a network HSM would count until they time out.
        if let Some(token) = TOKEN.get() {
            token.shut_down(SHUT_DOWN);
        }
        leave(0)
    });
    let second = spawn("last call", move || {
        STARTED.wait();
        channel.wait_for_hang_up();
        thread::sleep(2 * SHUT_DOWN);
        leave(0)
    });
    if !(first && second) {
        leave(1);
    }
    STARTED.wait();
}

fn work(channel: &Channel, token: &Token, baton: &Baton, me: usize) -> ! {
    let mut worker = Worker::new(token);
    worker.warm_up();
    let mut packet = Packet::new();
    'turns: loop {
        baton.take(me);
        let mut kept = true;
        while kept {
            let takes = baton.call_takes();
            let look = if takes <= SHORT { LOOK } else { Duration::ZERO };
            // Came while the last call was made: callers overlap, and so should their calls.
            let overlap = takes > QUICK && channel.has_packet();
            let Some((id, request)) = receive(channel, &mut packet, look) else {
                break 'turns;
            };
            packet.wipe();
            let mut sent = Ok(());
            let mut answer = || {
                baton.timed(|| sent = channel.send(&worker.answer(id, &request).encode()));
            };
            if takes <= QUICK || (takes <= SHORT && !overlap && !channel.has_packet()) {
                kept = baton.keep_during(me, &mut answer);
            } else {
                baton.pass(me);
                kept = false;
                answer();
            }
            drop(request);
            if let Err(error) = sent {
                log!("an answer cannot be sent: {error}");
                break 'turns;
            }
        }
    }
    // The thread that waits for the hang-up ends the process.
    loop {
        thread::park();
    }
}

/// The next request; None when the daemon is gone. A daemon that speaks otherwise than agreed is
/// another version or not ours: there is nothing to say to it.
fn receive(channel: &Channel, packet: &mut Packet, look: Duration) -> Option<(u64, Request)> {
    let problem = match channel.receive(packet, look) {
        Ok(Received::Packet(bytes)) => match Request::decode(bytes) {
            Ok(request) => return Some(request),
            Err(error) => format!("a malformed request: {error}"),
        },
        Ok(Received::Closed) => return None,
        Ok(Received::TooLong(len)) => format!("a request of {len} bytes"),
        Err(error) => format!("a socket error: {error}"),
    };
    log!("{problem}; leaving");
    leave(1)
}

fn respond(channel: &Channel, id: u64, outcome: Result<Answer, Fault>) {
    let response = Response {
        id,
        recovery: Recovery::default(),
        outcome,
    };
    if let Err(error) = channel.send(&response.encode()) {
        log!("an answer cannot be sent: {error}");
    }
}

/// False, and a line in the log, when the system grants no thread more.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> bool {
    let spawned = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(body);
    if let Err(error) = &spawned {
        log!("thread `{name}` cannot be started: {error}");
    }
    spawned.is_ok()
}

/// Ends the process without running the module's exit handlers, which may hang or crash.
pub(crate) fn leave(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}
