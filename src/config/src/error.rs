//! What is wrong with a configuration file: every mistake, in the file's order, each with its place,
//! its field, its cause and a way out.

use std::error::Error;
use std::fmt;

use crate::report;

/// Where in the file, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    /// Line.
    pub(crate) line: usize,
    /// Column, in characters.
    pub(crate) column: usize,
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    at: Option<Position>,
    /// What is wrong, with the field's path. No value that may be a secret.
    what: String,
    cause: Option<String>,
    hint: Option<String>,
}

impl Problem {
    /// Something about the file as a whole.
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self {
            at: None,
            what: what.into(),
            cause: None,
            hint: None,
        }
    }

    pub(super) fn at(self, at: Option<Position>) -> Self {
        Self { at, ..self }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// The causes as text: they end here, in front of a person, and stay comparable.
    pub(super) fn because(self, cause: &dyn fmt::Display) -> Self {
        Self {
            cause: Some(cause.to_string()),
            ..self
        }
    }
}

/// All mistakes of one file. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors {
    file: String,
    problems: Vec<Problem>,
    /// Found, but too many to list.
    more: usize,
}

impl Errors {
    pub(super) fn one(file: &str, problem: Problem) -> Self {
        Self {
            file: file.to_owned(),
            problems: vec![problem],
            more: 0,
        }
    }

    /// `problems` must not be empty.
    pub(super) fn many(file: &str, mut problems: Vec<Problem>, more: usize) -> Self {
        // Those without a place come first; the order of finding decides among equals.
        problems.sort_by_key(|problem| problem.at);
        Self {
            file: file.to_owned(),
            problems,
            more,
        }
    }

    fn count(&self) -> usize {
        self.problems.len() + self.more
    }

    /// All of it for a person: `error:`, `caused by:`, `hint:`, and how many they are.
    pub fn report(&self) -> String {
        let mut entries: Vec<String> = self
            .problems
            .iter()
            .map(|problem| {
                let what = format!("{}{}", self.place(problem), problem.what);
                let cause = problem.cause.iter().map(String::as_str);
                report::entry(&what, cause, problem.hint.as_deref())
            })
            .collect();
        if self.count() > 1 {
            let listed = match self.more {
                0 => String::new(),
                _ => format!(", of which {} are listed", self.problems.len()),
            };
            entries.push(format!("{}: {} errors{listed}\n", self.file, self.count()));
        }
        entries.join("\n")
    }

    fn place(&self, problem: &Problem) -> String {
        match problem.at {
            Some(Position { line, column }) => format!("{}:{line}:{column}: ", self.file),
            None => format!("{}: ", self.file),
        }
    }
}

/// One line for log and status: the first mistake and how many follow.
impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(first) = self.problems.first() {
            write!(f, "{}{}", self.place(first), first.what)?;
            if let Some(cause) = &first.cause {
                write!(f, ": {cause}")?;
            }
        }
        match self.count() {
            0 | 1 => Ok(()),
            2 => f.write_str(" (and 1 more error)"),
            count => write!(f, " (and {} more errors)", count - 1),
        }
    }
}

impl Error for Errors {}
