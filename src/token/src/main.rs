//! The module host: one process, one vendor module, one token.
//!
//! Everything that a vendor's library can do wrong (hang, crash, exit, corrupt memory) happens here
//! and is cured by the daemon ending this process. It takes requests on an inherited socket, in the
//! format of [`hsm_wire::host`], and knows nothing else of the daemon.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`channel`] | the socket to the daemon |
//! | [`serve`] | threads: who receives, who answers, who notices the end |
//! | [`session`] | one session thread's work and the recovery ladder |
//! | [`token`] | slot, login, PIN latch, re-initialisation |
//! | [`key`], [`wrap`], [`describe`] | find and fingerprint a key; seal and unseal; what is on the token |
//! | [`module`] | **the only calls of PKCS#11's C ABI** |
//! | [`failure`], [`latch`], [`pin`] | what codes mean; when to log in; the PIN's memory |

mod args;
mod channel;
mod describe;
mod failure;
mod key;
mod latch;
mod module;
mod pin;
mod serve;
mod session;
mod token;
mod wrap;

use std::process::ExitCode;

use args::{Command, USAGE};
use channel::Channel;

fn main() -> ExitCode {
    let (socket, _isolation) = match args::parse(std::env::args_os().skip(1)) {
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
        eprintln!("hsm-token: {panic}");
        std::process::abort();
    }));
    let (id, open) = serve::receive_open(&channel);
    serve::serve(channel, id, open)
}
