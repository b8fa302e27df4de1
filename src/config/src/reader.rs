//! Typed reading of the tree: each mistake is noted with its path, and reading goes on.
//!
//! A reading function returns `None` when it noted a mistake. Callers read all their fields first
//! and give up after the last, so that one run lists everything.
//!
//! **Invariant:** below a [`Cursor::quiet`] cursor no message repeats anything from the file but
//! the names of fields that exist.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::ops::RangeInclusive;

use hsm_wire::uri::nearest;

use crate::document::{self, Key, Node, Step};
use crate::error::{Errors, Problem};

/// A person mends the first few and runs the check again; and each costs one walk over the file.
const MAX_LISTED: usize = 32;

/// The mistakes noted so far.
#[derive(Default)]
pub(super) struct Log {
    noted: RefCell<Vec<Noted>>,
    more: Cell<usize>,
}

struct Noted {
    steps: Vec<Step>,
    /// Where a repeated key was first given.
    first: Option<Vec<Step>>,
    field: String,
    complaint: Complaint,
}

/// What is wrong with one value, without its path.
pub(super) struct Complaint {
    what: String,
    cause: Option<Box<dyn std::error::Error>>,
    hint: Option<String>,
}

impl Complaint {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cause: None,
            hint: None,
        }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    pub(super) fn because(self, cause: impl std::error::Error + 'static) -> Self {
        Self {
            cause: Some(Box::new(cause)),
            ..self
        }
    }
}

impl Log {
    fn note(&self, noted: Noted) {
        let mut list = self.noted.borrow_mut();
        if list.len() < MAX_LISTED {
            list.push(noted);
        } else {
            self.more.set(self.more.get() + 1);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.noted.borrow().is_empty()
    }

    /// Looks up where each mistake is.
    pub(super) fn into_errors(self, text: &str, file: &str) -> Errors {
        let problems = self.noted.into_inner().into_iter().map(|noted| {
            let Noted {
                steps,
                first,
                field,
                complaint,
            } = noted;
            let separator = if field.is_empty() { "" } else { ": " };
            let mut what = format!("{field}{separator}{}", complaint.what);
            if let Some(first) = first.and_then(|first| document::locate(text, &first)) {
                what += &format!(", first on line {}", first.line);
            }
            let mut problem = Problem::new(what).at(document::locate(text, &steps));
            if let Some(cause) = complaint.cause {
                problem = problem.because(&cause);
            }
            match complaint.hint {
                Some(hint) => problem.hint(hint),
                None => problem,
            }
        });
        Errors::many(file, problems.collect(), self.more.get())
    }
}

/// A part of a field's path.
pub(super) enum Way<'a> {
    Name(&'a str),
    Index(usize),
}

/// A value and the way to it.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    log: &'a Log,
    node: &'a Node,
    steps: Vec<Step>,
    path: String,
    quiet: bool,
}

impl<'a> Cursor<'a> {
    /// The whole document.
    pub(super) fn root(node: &'a Node, log: &'a Log) -> Self {
        Self {
            log,
            node,
            steps: Vec::new(),
            path: String::new(),
            quiet: false,
        }
    }

    /// From here on, no message repeats what the file says.
    pub(super) fn quiet(&self) -> Self {
        Self {
            quiet: true,
            ..self.clone()
        }
    }

    /// The text as a message may show it: escaped, cut, or not at all.
    pub(super) fn shown(&self, text: &str) -> String {
        if self.quiet {
            return "the value".to_owned();
        }
        format!("`{}`", shortened(text))
    }

    /// Notes a mistake in this value.
    pub(super) fn complain<T>(&self, complaint: Complaint) -> Option<T> {
        self.log.note(Noted {
            steps: self.steps.clone(),
            first: None,
            field: self.path.clone(),
            complaint,
        });
        None
    }

    fn expected<T>(&self, expected: impl Display) -> Option<T> {
        self.complain(self.instead_of(expected))
    }

    fn instead_of(&self, expected: impl Display) -> Complaint {
        let found = match self.node {
            Node::Nothing => "nothing",
            Node::Bool(_) => "true or false",
            Node::Integer(_) => "a number",
            Node::Fraction => "a number with a fraction",
            Node::Text(_) => "text",
            Node::List(_) => "a list",
            Node::Map(_) => "fields",
        };
        Complaint::new(format!("expected {expected}, found {found}"))
    }

    /// The value inside that these names and indices lead to. Notes nothing.
    pub(super) fn find(&self, way: &[Way<'_>]) -> Option<Self> {
        let Some((way, rest)) = way.split_first() else {
            return Some(self.clone());
        };
        let next = match (way, self.node) {
            (Way::Name(name), Node::Map(entries)) => {
                let index = entries
                    .iter()
                    .position(|(key, _)| matches!(key, Key::Text(text) if text == name))?;
                self.inside(Step::Value(index), &entries[index].1, self.path_of(name))
            }
            (Way::Index(index), Node::List(items)) => {
                let path = format!("{}[{index}]", self.path);
                self.inside(Step::Item(*index), items.get(*index)?, path)
            }
            _ => return None,
        };
        next.find(rest)
    }

    fn inside(&self, step: Step, node: &'a Node, path: String) -> Self {
        let mut steps = self.steps.clone();
        steps.push(step);
        Self {
            log: self.log,
            node,
            steps,
            path,
            quiet: self.quiet,
        }
    }

    fn path_of(&self, name: &str) -> String {
        let separator = if self.path.is_empty() { "" } else { "." };
        format!("{}{separator}{name}", self.path)
    }

    /// A map whose fields all have these names, each at most once.
    pub(super) fn fields(&self, names: &'static [&'static str]) -> Option<Fields<'a>> {
        let mut meant = Vec::new();
        let given = self.distinct(Some(names), &mut meant)?;
        Some(Fields {
            cursor: self.clone(),
            given,
            meant,
        })
    }

    /// A map with free keys, each at most once.
    pub(super) fn entries(&self) -> Option<Vec<(&'a str, Cursor<'a>)>> {
        self.distinct(None, &mut Vec::new())
    }

    /// `meant` receives the known names that misspelt ones are nearest to.
    fn distinct(
        &self,
        known: Option<&'static [&'static str]>,
        meant: &mut Vec<&'static str>,
    ) -> Option<Vec<(&'a str, Self)>> {
        let Node::Map(entries) = self.node else {
            return match known {
                Some(names) => self.expected(format!("fields ({})", names.join(", "))),
                None => self.expected("a map of names to values"),
            };
        };
        let mut given: Vec<(&str, Self)> = Vec::new();
        for (index, (key, node)) in entries.iter().enumerate() {
            let at_key = |path| self.inside(Step::Key(index), node, path);
            let Key::Text(name) = key else {
                at_key(self.path.clone())
                    .complain::<()>(Complaint::new("a field's name must be text"));
                continue;
            };
            if let Some(names) = known
                && !names.contains(&name.as_str())
            {
                let near = nearest(name, names.iter().copied());
                meant.extend(near);
                let path = match near {
                    // Whoever writes a PIN where its source belongs reads this in a log.
                    None if self.quiet => self.path.clone(),
                    _ => self.path_of(&shortened(name)),
                };
                at_key(path).unknown(near, names);
                continue;
            }
            if let Some((_, first)) = given.iter().find(|(other, _)| *other == name) {
                let key = at_key(self.path_of(&shortened(name)));
                self.log.note(Noted {
                    steps: key.steps,
                    first: Some(first.steps.clone()),
                    field: key.path,
                    complaint: Complaint::new("given twice"),
                });
                continue;
            }
            let path = self.path_of(&shortened(name));
            given.push((name, self.inside(Step::Value(index), node, path)));
        }
        Some(given)
    }

    fn unknown(&self, near: Option<&str>, names: &'static [&'static str]) {
        let what = match near {
            None if self.quiet => "an unknown field; its name is not shown, it may be a secret",
            _ => "no such field",
        };
        let fields = format!("the fields here are {}", names.join(", "));
        let hint = match near {
            Some(near) => format!("did you mean `{near}`? {fields}"),
            None => fields,
        };
        self.complain::<()>(Complaint::new(what).hint(hint));
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node, Node::Map(_))
    }

    /// A list with so many values.
    pub(super) fn list(&self, range: RangeInclusive<usize>) -> Option<Vec<Self>> {
        let Node::List(items) = self.node else {
            return self.expected("a list");
        };
        if !range.contains(&items.len()) {
            let (least, most) = (range.start(), range.end());
            let what = match items.len() {
                0 => "the list is empty".to_owned(),
                count => format!("the list has {count} entries, expected {least} to {most}"),
            };
            return self.complain(Complaint::new(what));
        }
        let items = items.iter().enumerate().map(|(index, node)| {
            self.inside(Step::Item(index), node, format!("{}[{index}]", self.path))
        });
        Some(items.collect())
    }

    /// A list, each item read by `read`; `None` if any of them was wrong.
    pub(super) fn each<T>(
        &self,
        range: RangeInclusive<usize>,
        mut read: impl FnMut(&Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        // Not a lazy collect: all items are to be read, also those behind a wrong one.
        let read: Vec<Option<T>> = self.list(range)?.iter().map(&mut read).collect();
        read.into_iter().collect()
    }

    /// A text, checked and converted by `parse`.
    pub(super) fn text<T>(
        &self,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, Complaint>,
    ) -> Option<T> {
        match self.node {
            Node::Text(text) => match parse(text) {
                Ok(value) => Some(value),
                Err(complaint) => self.complain(complaint),
            },
            _ => self.expected(expected),
        }
    }

    /// A text that YAML may take for another type, such as the name `2026`.
    pub(super) fn quotable<T>(
        &self,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, Complaint>,
    ) -> Option<T> {
        match self.node {
            Node::Bool(_) | Node::Integer(_) | Node::Fraction => self.complain(
                self.instead_of(expected)
                    .hint("put the value in double quotes: without them YAML reads another type"),
            ),
            _ => self.text(expected, parse),
        }
    }

    /// A whole number within `range`.
    pub(super) fn integer(&self, range: RangeInclusive<u32>) -> Option<u32> {
        let (least, most) = (range.start(), range.end());
        let expected = format!("a whole number from {least} to {most}");
        match self.node {
            Node::Integer(value) => match u32::try_from(*value) {
                Ok(value) if range.contains(&value) => Some(value),
                _ => {
                    let shown = self.shown(&value.to_string());
                    self.complain(Complaint::new(format!("{shown} is not {expected}")))
                }
            },
            _ => self.expected(expected),
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self) -> Option<bool> {
        match self.node {
            Node::Bool(value) => Some(*value),
            _ => self.expected("true or false"),
        }
    }

    /// One of these words.
    pub(super) fn word<T: Copy>(&self, words: &[(&'static str, T)]) -> Option<T> {
        let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let expected = match all.as_slice() {
            [only] => format!("`{only}`"),
            _ => format!("one of {}", all.join(", ")),
        };
        self.text(&expected, |text| {
            if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
                return Ok(*value);
            }
            let complaint = Complaint::new(format!("{} is not {expected}", self.shown(text)));
            Err(match nearest(text, all.iter().copied()) {
                Some(near) => complaint.hint(format!("did you mean `{near}`?")),
                None => complaint,
            })
        })
    }
}

/// Escaped, and no longer than a line of a terminal.
fn shortened(text: &str) -> String {
    let cut: String = text.chars().take(60).collect();
    let end = if cut.len() < text.len() { "…" } else { "" };
    format!("{}{end}", cut.escape_debug())
}

/// The fields given in a map.
pub(super) struct Fields<'a> {
    cursor: Cursor<'a>,
    given: Vec<(&'a str, Cursor<'a>)>,
    meant: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The map itself.
    pub(super) fn cursor(&self) -> &Cursor<'a> {
        &self.cursor
    }

    /// Was a field given whose name is nearest to this one?
    pub(super) fn means(&self, name: &str) -> bool {
        self.meant.contains(&name)
    }

    /// The field's value, if the field is given.
    pub(super) fn get(&self, name: &str) -> Option<&Cursor<'a>> {
        self.given
            .iter()
            .find(|(given, _)| *given == name)
            .map(|(_, cursor)| cursor)
    }

    /// A field that must be there; `example` is what to add.
    pub(super) fn required<T>(
        &self,
        name: &str,
        example: &str,
        read: impl FnOnce(&Cursor<'a>) -> Option<T>,
    ) -> Option<T> {
        match self.get(name) {
            Some(cursor) => read(cursor),
            // Noted as a misspelt field.
            None if self.means(name) => None,
            None => {
                let missing = Cursor {
                    path: self.cursor.path_of(name),
                    ..self.cursor.clone()
                };
                missing.complain(
                    Complaint::new("the field is missing").hint(format!("add `{example}`")),
                )
            }
        }
    }

    /// A field that may be left out.
    pub(super) fn optional<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Cursor<'a>) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.get(name) {
            Some(cursor) => read(cursor).map(Some),
            None => Some(None),
        }
    }

    /// A field that may be left out and then has this value.
    pub(super) fn or<T>(
        &self,
        name: &str,
        default: T,
        read: impl FnOnce(&Cursor<'a>) -> Option<T>,
    ) -> Option<T> {
        match self.get(name) {
            Some(cursor) => read(cursor),
            None => Some(default),
        }
    }
}
