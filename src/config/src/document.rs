//! YAML text → a tree of plain values, and the place of each value in the text.
//!
//! Nothing here knows a field's name. Values are read as the plain YAML types and not by a derived
//! `Deserialize`, for three reasons: all mistakes of a file can be reported at once instead of one
//! per run; a repeated key is seen at every level, in free maps too; and no message of a library
//! repeats a value, which may be a PIN that somebody wrote where its file's name belongs.
//!
//! **Bounds:** [`MAX_BYTES`], then [`MAX_VALUES`] and [`MAX_DEPTH`] while the tree is built. Aliases
//! are expanded by the YAML library before we see them, so the bound on values is what stops a file
//! whose few anchors stand for millions of values.

use std::cell::Cell;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Errors, Position, Problem};

/// A file with eight tokens and sixty-four keys takes some 20 KiB; more than this is not ours.
pub const MAX_BYTES: usize = 256 * 1024;

/// The same file has about a thousand values.
const MAX_VALUES: usize = 8 * 1024;

/// The deepest field of the format, `tokens[0].host.read_only[0]`, is at depth 5.
const MAX_DEPTH: usize = 16;

/// The parser's time grows with the square of the depth of brackets, so this comes before it. Brackets
/// in quotes and comments count too: no file of ours has that many left open.
const MAX_OPEN_BRACKETS: usize = 64;

/// A value with what is inside it.
#[derive(Debug, PartialEq)]
pub(super) enum Node {
    /// `null`, `~` or nothing at all.
    Nothing,
    Bool(bool),
    Integer(i128),
    /// A number with a fraction or an exponent. No field takes one.
    Fraction,
    Text(String),
    List(Vec<Node>),
    /// In the file's order, repeated keys included.
    Map(Vec<(Key, Node)>),
}

/// A key in a map.
#[derive(Debug, PartialEq)]
pub(super) enum Key {
    Text(String),
    /// A number, a list, … which no field is named by. Not kept: it may be a secret.
    Other,
}

/// One step from a value to a value inside it, or to the key it stands under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The key of the n-th entry of a map.
    Key(usize),
    /// The value of the n-th entry of a map.
    Value(usize),
    /// The n-th item of a list.
    Item(usize),
}

/// Reads the one document that `text` holds.
pub(super) fn parse(text: &str, file: &str) -> Result<Node, Errors> {
    check_brackets(text).map_err(|problem| Errors::one(file, problem))?;
    check_syntax(text).map_err(|problem| Errors::one(file, problem))?;
    let budget = Cell::new(MAX_VALUES);
    let too_deep = Cell::new(false);
    let seed = Tree {
        budget: &budget,
        too_deep: &too_deep,
        depth: MAX_DEPTH,
    };
    seed.deserialize(serde_yaml::Deserializer::from_str(text))
        .map_err(|error| {
            let problem = if budget.get() == 0 {
                Problem::new(format!("more than {MAX_VALUES} values"))
                    .hint("an alias (`*name`) counts as all that its anchor (`&name`) holds")
            } else if too_deep.get() {
                Problem::new(format!("nested deeper than {MAX_DEPTH} levels"))
            } else {
                // The syntax is right and no bound was met, so this is the library's word on a tag.
                // Not repeated, because it quotes the value.
                Problem::new("a tag (`!…`), which no value here takes").hint("write a plain value")
            };
            Errors::one(file, problem.at(position(&error)))
        })
}

/// The place of the value or key that `steps` lead to.
///
/// The library tells places only in errors. So the walk ends in an error, raised by [`Here`] on the
/// value that was looked for: what is reported is what the parser itself saw, with no second reading
/// of YAML that could disagree with it. Linear in the text, and used for errors only.
pub(super) fn locate(text: &str, steps: &[Step]) -> Option<Position> {
    match Walk(steps).deserialize(serde_yaml::Deserializer::from_str(text)) {
        Ok(Never) => None,
        Err(error) => position(&error),
    }
}

fn position(error: &serde_yaml::Error) -> Option<Position> {
    error.location().map(|location| Position {
        line: location.line(),
        column: location.column(),
    })
}

fn check_brackets(text: &str) -> Result<(), Problem> {
    let mut open = 0_usize;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > MAX_OPEN_BRACKETS {
            let line = 1 + text.as_bytes()[..index]
                .iter()
                .filter(|b| **b == b'\n')
                .count();
            let what = format!("line {line}: more than {MAX_OPEN_BRACKETS} brackets are open");
            return Err(Problem::new(what).hint("close each `[` and `{`"));
        }
    }
    Ok(())
}

/// What the parser and the document structure say. Their messages never quote the text.
fn check_syntax(text: &str) -> Result<(), Problem> {
    // A file cut off inside a comment, or one that only has comments, is empty too.
    let mut documents = serde_yaml::Deserializer::from_str(text);
    let first = documents.next();
    if let Some(first) = first {
        IgnoredAny::deserialize(first).map_err(|error| syntax_problem(text, &error))?;
    }
    match documents.next() {
        None => Ok(()),
        Some(_) => Err(Problem::new("more than one YAML document")
            .hint("keep one document in the file; `---` begins another")),
    }
}

fn syntax_problem(text: &str, error: &serde_yaml::Error) -> Problem {
    let at = position(error);
    let problem = Problem::new("not valid YAML").at(at).because(error);
    let line = at.and_then(|at| text.lines().nth(at.line.saturating_sub(1)));
    match line {
        Some(line) if line.trim_start_matches(' ').starts_with('\t') => {
            problem.hint("the line is indented with a tab; YAML takes spaces only")
        }
        _ => problem,
    }
}

/// Builds a [`Node`], within the bounds.
#[derive(Clone, Copy)]
struct Tree<'a> {
    budget: &'a Cell<usize>,
    too_deep: &'a Cell<bool>,
    depth: usize,
}

impl Tree<'_> {
    fn spend<E: de::Error>(&self) -> Result<(), E> {
        let left = self.budget.get().saturating_sub(1);
        self.budget.set(left);
        if left == 0 {
            return Err(E::custom("too many values"));
        }
        Ok(())
    }

    fn deeper<E: de::Error>(&self) -> Result<Self, E> {
        let Some(depth) = self.depth.checked_sub(1) else {
            self.too_deep.set(true);
            return Err(E::custom("too deep"));
        };
        Ok(Self { depth, ..*self })
    }
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
        self.spend()?;
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value")
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Nothing)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Nothing)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Integer(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Integer(value))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        // Far outside every field's range, wherever it is cut.
        Ok(Node::Integer(i128::try_from(value).unwrap_or(i128::MAX)))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Fraction)
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let inner = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let inner = self.deeper()?;
        let mut map = Vec::new();
        while let Some(key) = entries.next_key_seed(inner)? {
            let key = match key {
                Node::Text(name) => Key::Text(name),
                _ => Key::Other,
            };
            map.push((key, entries.next_value_seed(inner)?));
        }
        Ok(Node::Map(map))
    }
}

/// Walks to the value that the steps lead to, and fails there.
struct Walk<'a>(&'a [Step]);

/// A walk has no good end.
struct Never;

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = Never;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Never, D::Error> {
        if self.0.is_empty() {
            return from.deserialize_any(Here);
        }
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = Never;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the value looked for")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Never, A::Error> {
        if let Some((Step::Item(index), rest)) = self.0.split_first() {
            for _ in 0..*index {
                items.next_element::<IgnoredAny>()?;
            }
            items.next_element_seed(Walk(rest))?;
        }
        Err(de::Error::custom("not found"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Never, A::Error> {
        if let Some((Step::Key(index) | Step::Value(index), rest)) = self.0.split_first() {
            for _ in 0..*index {
                entries.next_entry::<IgnoredAny, IgnoredAny>()?;
            }
            if matches!(self.0[0], Step::Key(_)) {
                entries.next_key_seed(Walk(&[]))?;
            }
            entries.next_key::<IgnoredAny>()?;
            entries.next_value_seed(Walk(rest))?;
        }
        Err(de::Error::custom("not found"))
    }
}

/// Fails on whatever it is given: serde's default for every `visit_…`.
struct Here;

impl Visitor<'_> for Here {
    type Value = Never;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str, steps: &[Step]) -> (usize, usize) {
        let position = locate(text, steps).expect("a position");
        (position.line, position.column)
    }

    fn refused(text: &str) -> String {
        parse(text, "f").expect_err("refused").to_string()
    }

    #[test]
    fn every_key_and_value_is_located_as_the_parser_saw_it() {
        use Step::{Item, Key, Value};
        let text = "# head\na:\n  - x: 1\n    y: [7, {z: q}]\n  - \"x\": >\n      folded\n      text\nb: {c: d}\n";
        assert_eq!(at(text, &[]), (2, 1));
        assert_eq!(at(text, &[Key(0)]), (2, 1));
        assert_eq!(at(text, &[Value(0)]), (3, 3));
        assert_eq!(at(text, &[Value(0), Item(0)]), (3, 5));
        assert_eq!(at(text, &[Value(0), Item(0), Value(0)]), (3, 8));
        assert_eq!(at(text, &[Value(0), Item(0), Key(1)]), (4, 5));
        let nested = [Value(0), Item(0), Value(1), Item(1), Value(0)];
        assert_eq!(at(text, &nested), (4, 16));
        assert_eq!(at(text, &[Value(0), Item(1), Key(0)]), (5, 5));
        assert_eq!(at(text, &[Value(1), Value(0)]), (8, 8));
    }

    #[test]
    fn a_repeated_key_keeps_both_its_places() {
        let text = "env:\n  A: 1\n  A: 2\n";
        let Node::Map(top) = parse(text, "f").expect("parses") else {
            panic!("a map");
        };
        assert!(matches!(&top[0].1, Node::Map(env) if env.len() == 2));
        assert_eq!(at(text, &[Step::Value(0), Step::Key(1)]), (3, 3));
    }

    #[test]
    fn an_alias_bomb_meets_the_bound_on_values() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let below = format!("*a{}, ", level - 1).repeat(10);
            text += &format!("a{level}: &a{level} [{below}]\n");
        }
        assert!(refused(&text).contains("more than 8192 values"));
    }

    #[test]
    fn an_alias_to_what_it_is_inside_of_ends() {
        assert!(refused("a: &a [*a]\n").contains("nested deeper than 16 levels"));
    }

    #[test]
    fn deep_nesting_ends() {
        let text = format!("a: {}{}", "[".repeat(40), "]".repeat(40));
        assert!(refused(&text).contains("nested deeper than 16 levels"));
    }

    /// The longest texts of shapes that a parser might take long for, or overflow its stack with.
    #[test]
    fn hostile_shapes_are_refused_quickly() {
        let start = std::time::Instant::now();
        for shape in [
            "[",
            "{",
            "- ",
            "? ",
            "a: {",
            "&a ",
            "!",
            "\"",
            "*a ",
            "{a: [",
            "|\n",
            "%",
            "\t",
            "a:\n",
            "#",
            "'",
            "--- ",
            "[a,",
            "- &a *a\n",
            "k: \n ",
        ] {
            let text = shape.repeat(super::MAX_BYTES / shape.len());
            let _ = parse(&text, "f");
        }
        assert!(start.elapsed().as_secs() < 20);
    }

    #[test]
    fn a_second_document_is_refused() {
        assert!(refused("a: b\n---\nc: d\n").contains("more than one YAML document"));
        assert!(parse("---\na: b\n...\n", "f").is_ok());
    }

    #[test]
    fn a_tag_is_refused_without_quoting_the_value() {
        for text in [
            "pin: !!int 12x34\n",
            "pin: !secret 12x34\n",
            "pin: !!bool 12x34\n",
        ] {
            let message = refused(text);
            assert!(message.contains("a tag"), "{message}");
            assert!(!message.contains("12x34"), "{message}");
        }
    }

    #[test]
    fn a_cut_or_broken_text_is_a_syntax_error_with_its_line() {
        for (text, line) in [
            ("a: [b\n", 2),
            ("a: b\n c: d\n", 2),
            ("a: \"b\n", 2),
            ("a: *b\n", 1),
        ] {
            let message = refused(text);
            assert!(message.starts_with(&format!("f:{line}:")), "{message}");
        }
    }
}
