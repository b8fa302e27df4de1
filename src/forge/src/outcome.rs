//! What a command leaves behind: text on two streams and an exit status.
//!
//! Commands return it and print nothing themselves, so that a reader who hangs up is met in one place.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use hsm_config::report;

/// Refused, or an input that is wrong. A wrong command line is 2, as clap has it.
const REFUSED: u8 = 1;

/// The form of what goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Text,
    /// For programs; fields are added over time, never renamed
    Json,
}

/// How a command ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    out: String,
    err: String,
    code: u8,
}

/// Why a command could not do it, as it is printed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure(String);

impl Outcome {
    /// Done.
    pub(crate) fn done(out: String) -> Self {
        Self {
            out,
            ..Self::default()
        }
    }

    /// Not done, and yet there is something to say.
    pub(crate) fn refused(out: String, why: Failure) -> Self {
        Self {
            out,
            ..Self::from(why)
        }
    }

    /// Prints both streams and gives the exit status.
    pub(crate) fn leave(self) -> ExitCode {
        let mut stdout = io::stdout().lock();
        let written = stdout
            .write_all(self.out.as_bytes())
            .and_then(|()| stdout.flush());
        // Nobody is left to tell if this fails.
        let _ = io::stderr().write_all(self.err.as_bytes());
        match written {
            // Whoever hung up (`| head`) has seen enough; it does not change what was found.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let text = report::entry(&format!("cannot print: {error}"), [], None);
                let _ = io::stderr().write_all(text.as_bytes());
                ExitCode::from(REFUSED)
            }
            _ => ExitCode::from(self.code),
        }
    }
}

impl From<Failure> for Outcome {
    fn from(Failure(err): Failure) -> Self {
        Self {
            out: String::new(),
            err,
            code: REFUSED,
        }
    }
}

impl Failure {
    /// Without a cause.
    pub(crate) fn new(what: &str, hint: Option<&str>) -> Self {
        Self(report::entry(what, [], hint))
    }

    /// With all causes of `error` below `what`.
    pub(crate) fn because(what: &str, error: &dyn Error, hint: Option<&str>) -> Self {
        let mut causes = vec![error.to_string()];
        let mut next = error.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        Self(report::entry(what, causes.iter().map(String::as_str), hint))
    }

    /// An error that says all itself.
    pub(crate) fn of(error: &dyn Error, hint: Option<&str>) -> Self {
        Self(report::chain(error, hint))
    }

    /// Printed already: one `error:` paragraph or several.
    pub(crate) fn reported(paragraphs: &[String]) -> Self {
        Self(paragraphs.join("\n"))
    }
}

/// As JSON, with a line end.
pub(crate) fn json(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
