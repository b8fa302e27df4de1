//! Text that came out of a vendor's module, made fit for logs and error messages.

/// Longest text that is passed on.
const MAX_LEN: usize = 1024;

/// The text on one line, without control characters: those could forge log lines or move a
/// terminal's cursor. So could the invisible ones that turn the direction of writing.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                '\u{fffd}'
            }
            c if c.is_control() => ' ',
            c => c,
        })
        .scan(0, |len, c| {
            *len += c.len_utf8();
            (*len <= MAX_LEN).then_some(c)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_get_through() {
        assert_eq!(
            printable("a\nb\x1b[2Jc\u{9b}d\u{202e}e"),
            "a b [2Jc d\u{fffd}e"
        );
        assert_eq!(printable("Schlüssel"), "Schlüssel");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(printable(&"ü".repeat(1000)), "ü".repeat(MAX_LEN / 2));
    }
}
