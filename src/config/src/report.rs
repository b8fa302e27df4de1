//! How an error is printed for a person: what happened, why, what to do.
//!
//! Printed once, at the edge; libraries keep their causes in `source()`.

use std::error::Error;

/// `error:`, one `caused by:` per cause, `hint:`.
pub fn entry<'a>(
    what: &str,
    causes: impl IntoIterator<Item = &'a str>,
    hint: Option<&str>,
) -> String {
    let mut out = format!("error: {what}\n");
    for cause in causes {
        out += &format!("caused by: {cause}\n");
    }
    if let Some(hint) = hint {
        out += &format!("hint: {hint}\n");
    }
    out
}

/// An error with all its sources.
pub fn chain(error: &dyn Error, hint: Option<&str>) -> String {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    entry(&error.to_string(), causes.iter().map(String::as_str), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot bind {name}")]
    struct Bind {
        name: &'static str,
        #[source]
        cause: std::io::Error,
    }

    #[test]
    fn a_chain_prints_each_cause_once_and_the_hint_last() {
        let error = Bind {
            name: "@hsm-kms",
            cause: std::io::Error::other("address in use"),
        };
        assert_eq!(
            chain(&error, Some("stop the other process")),
            "error: cannot bind @hsm-kms\ncaused by: address in use\nhint: stop the other process\n"
        );
    }
}
