//! The module host: one process, one vendor module, one token.
//!
//! Everything that a vendor's library can do wrong (hang, crash, exit, corrupt memory) happens here
//! and is cured by the daemon ending this process. It takes requests on an inherited socket, in the
//! format of [`hsm_wire::host`], and knows nothing else of the daemon.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`isolate`] | namespaces, root folder, privileges: before any vendor code |
//! | [`channel`] | the socket to the daemon |
//! | [`serve`], [`baton`] | threads: who answers, who notices the end; who receives |
//! | [`session`] | one session thread's work and the recovery ladder |
//! | [`token`] | what session threads share; re-initialisation |
//! | [`login`], [`latch`], [`pin`] | find the slot and log in; when to; the PIN's memory |
//! | [`key`], [`wrap`], [`describe`] | find and fingerprint a key; seal and unseal; what is on the token |
//! | [`module`] | **the only calls of PKCS#11's C ABI** |
//! | [`failure`] | what codes mean, and which rung of the ladder helps |

/// A line for the daemon's log, which reads this process's stderr. A daemon that does not read is no
/// reason to fail.
macro_rules! log {
    ($($argument:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "hsm-token: {}", format_args!($($argument)*));
    }};
}

mod args;
mod baton;
mod channel;
mod describe;
mod failure;
mod isolate;
mod key;
mod latch;
mod login;
mod module;
mod pin;
mod rsa;
mod selftest;
mod serve;
mod session;
mod token;
mod wrap;

use std::path::Path;
use std::process::ExitCode;

use args::{Command, USAGE};
use channel::Channel;
use hsm_wire::fault::Fault;

fn main() -> ExitCode {
    let (socket, isolation) = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("hsm-token {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Command::Serve { socket, isolation }) => (socket, isolation),
        Err(error) => {
            eprint!("error: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let channel = match Channel::adopt(socket) {
        Ok(channel) => channel,
        Err(error) => {
            eprint!(
                "error: descriptor {socket} is no session socket: {error}\n\
                 hint: hsm-token is not started by hand; hsmd and hsmctl start it\n\n{USAGE}"
            );
            return ExitCode::from(2);
        }
    };
    // A thread that is gone would be missed by nobody but the requests waiting for it.
    std::panic::set_hook(Box::new(|panic| {
        log!("{panic}");
        std::process::abort();
    }));
    if let Err(fault) = isolate::prepare(&channel) {
        return refuse_open(&channel, fault);
    }
    let Some(isolation) = isolation else {
        let (id, open) = serve::receive_open(&channel);
        serve::serve(channel, id, open)
    };
    let (channel, tether) = match isolate::split(channel, &isolation) {
        Ok(inner) => inner,
        Err((channel, fault)) => return refuse_open(&channel, fault),
    };
    let (id, open) = serve::receive_open(&channel);
    match isolate::confine(&isolation, Path::new(&open.module), tether) {
        Ok(()) => serve::serve(channel, id, open),
        Err(fault) => serve::refuse(&channel, id, fault),
    }
}

/// The daemon is told why with the first answer it waits for.
fn refuse_open(channel: &Channel, fault: Fault) -> ExitCode {
    let (id, open) = serve::receive_open(channel);
    drop(open);
    serve::refuse(channel, id, fault)
}
