//! Lines of a bearable length.

use std::borrow::Cow;

/// What a terminal of the usual width shows beside a margin.
const WIDTH: usize = 98;

/// Labels come from tokens and names from etcd: no terminal is to obey them.
fn shown(word: &str) -> Cow<'_, str> {
    if !word.chars().any(char::is_control) {
        return Cow::Borrowed(word);
    }
    let shown = word.chars().map(|c| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    });
    Cow::Owned(shown.collect())
}

/// `text` in lines, the first after `first`, the others after as many spaces. Words that are longer
/// than a line, such as URIs, stay whole.
pub(crate) fn paragraph(first: &str, text: &str) -> String {
    let indent = first.chars().count();
    let mut out = String::from(first);
    let mut column = indent;
    for word in text.split(' ') {
        let word = shown(word);
        let length = word.chars().count();
        if column > indent && column + 1 + length > WIDTH {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > indent {
            out.push(' ');
            column += 1;
        }
        out += &word;
        column += length;
    }
    out.push('\n');
    out
}

/// Named values, one a line, under each other; empty ones are left out.
pub(crate) fn table(indent: &str, rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| paragraph(&format!("{indent}{name:width$}  "), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paragraph_breaks_between_words_and_keeps_long_ones_whole() {
        let long = "x".repeat(120);
        let text = paragraph(
            "  1. ",
            &format!("{} {long} end", "word ".repeat(30).trim()),
        );
        for line in text.lines() {
            assert!(
                line.chars().count() <= WIDTH || line.trim() == long,
                "{line}"
            );
        }
        assert!(text.lines().skip(1).all(|line| line.starts_with("     ")));
        assert_eq!(text.split_whitespace().count(), 1 + 30 + 1 + 1);
    }

    #[test]
    fn a_terminal_is_told_nothing_but_text() {
        assert_eq!(paragraph("", "a\u{1b}[31mb c\nd"), "a\\u{1b}[31mb c\\nd\n");
    }

    #[test]
    fn a_table_lines_its_values_up_and_drops_empty_ones() {
        let rows = [
            ("a", "1".into()),
            ("none", String::new()),
            ("long", "2".into()),
        ];
        assert_eq!(table(" ", &rows), " a     1\n long  2\n");
    }
}
