//! Why a measurement could not be made.

use std::io;
use std::path::PathBuf;

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// The operating system said no.
    #[error("cannot {doing}")]
    Io {
        /// What was being done, as a verb.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The operating system said no, about a file.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// HTTP/2 broke.
    #[error("the HTTP/2 connection to the server broke")]
    Http2(#[source] h2::Error),
    /// A gRPC message was not what the method answers with.
    #[error("the server answered {method} with something else than that method's message: {what}")]
    Message {
        /// Which method.
        method: &'static str,
        /// What was wrong.
        what: &'static str,
    },
    /// The method failed.
    #[error("{method} failed with gRPC status {code}: {message}")]
    Status {
        /// Which method.
        method: &'static str,
        /// gRPC code.
        code: u32,
        /// As the server put it.
        message: String,
    },
    /// The plaintext that came back is another one.
    #[error("{who} gave back another plaintext than was sealed; its figures would mean nothing")]
    WrongPlaintext {
        /// Who.
        who: &'static str,
    },
    /// It never came up.
    #[error("the server at {} did not answer Encrypt within {seconds} s", socket.display())]
    NeverReady {
        /// Its socket.
        socket: PathBuf,
        /// How long it was given.
        seconds: u64,
        /// The last answer.
        #[source]
        last: Box<BenchError>,
    },
    /// The module said no.
    #[error("cannot {doing} through the PKCS#11 module")]
    Pkcs11 {
        /// What was being done, as a verb.
        doing: &'static str,
        /// Why not.
        #[source]
        source: cryptoki::error::Error,
    },
    /// No such token or key.
    #[error("the PKCS#11 module shows no {what} labelled \"{label}\"")]
    NotFound {
        /// Token or key.
        what: &'static str,
        /// Its label.
        label: String,
    },
    /// A process that measures or is measured failed.
    #[error("{who} {what}")]
    Process {
        /// Which.
        who: String,
        /// What it did.
        what: String,
    },
    /// tonic's server broke.
    #[error("the echo server failed")]
    Echo(#[source] tonic::transport::Error),
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}
