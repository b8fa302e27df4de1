//! The small values: names, paths, durations, modes, owners. Pure text in, checked value out.

use std::path::PathBuf;
use std::time::Duration;

use hsm_wire::uri::{Uri, nearest};

use crate::reader::{Complaint, Cursor};

/// Room for the terminating zero in `sun_path`, which has 108 bytes.
const MAX_SOCKET_NAME: usize = 107;

/// An absolute path without `..`.
pub(super) fn path(cursor: &Cursor<'_>) -> Option<PathBuf> {
    cursor.text("an absolute path", |text| {
        let shown = cursor.shown(text);
        if !text.starts_with('/') {
            // The daemon's working directory is nobody's choice, so a relative path means nothing.
            return Err(Complaint::new(format!(
                "{shown} is not an absolute path; it must begin with `/`"
            )));
        }
        // A line end would be a line of its own in the log.
        if text.chars().any(char::is_control) || text.len() > 4095 {
            return Err(Complaint::new(format!("{shown} cannot be a path")));
        }
        let path = PathBuf::from(text);
        if path
            .components()
            .any(|part| part == std::path::Component::ParentDir)
        {
            return Err(Complaint::new(format!(
                "{shown} contains `..`; write where it leads to"
            )));
        }
        Ok(path)
    })
}

/// The path of a unix socket.
pub(super) fn socket_path(cursor: &Cursor<'_>) -> Option<PathBuf> {
    let path = path(cursor)?;
    let bytes = path.as_os_str().len();
    if bytes > MAX_SOCKET_NAME {
        return cursor.complain(Complaint::new(format!(
            "{bytes} bytes are too long for the path of a socket, at most {MAX_SOCKET_NAME}"
        )));
    }
    if path.parent().is_none() {
        return cursor.complain(Complaint::new("a socket needs a name inside a folder"));
    }
    Some(path)
}

/// The name of an abstract socket, without its `@`.
pub(super) fn abstract_name(cursor: &Cursor<'_>) -> Option<String> {
    cursor.quotable("the name of an abstract socket", |text| {
        if text.len() > MAX_SOCKET_NAME {
            return Err(Complaint::new(format!(
                "{} bytes are too long for the name of an abstract socket, at most {MAX_SOCKET_NAME}",
                text.len()
            )));
        }
        if let Some(name) = text.strip_prefix('@') {
            return Err(Complaint::new(format!(
                "{} begins with `@`, which marks an abstract socket in a URI only",
                cursor.shown(text)
            ))
            .hint(format!("write {}", cursor.shown(name))));
        }
        // kube-apiserver's endpoint is a URI: other characters would never reach us as written.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/".contains(&byte);
        if text.is_empty() || !text.bytes().all(plain) {
            return Err(Complaint::new(format!(
                "{} is no name for an abstract socket: letters, digits and -._/ only",
                cursor.shown(text)
            )));
        }
        Ok(text.to_owned())
    })
}

/// The name of a cluster: it goes into every envelope, so it has to survive copying by hand.
pub(super) fn cluster_name(cursor: &Cursor<'_>) -> Option<String> {
    cursor.quotable("a name", |text| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let good = (1..=63).contains(&text.len())
            && text.bytes().all(plain)
            && text.starts_with(|first: char| first.is_ascii_alphanumeric());
        if good {
            return Ok(text.to_owned());
        }
        Err(Complaint::new(format!(
            "{} is no name for a cluster: 1 to 63 letters, digits and -._ that begin with a letter or digit",
            cursor.shown(text)
        )))
    })
}

/// The name of a token in logs, health and metrics.
pub(super) fn token_name(cursor: &Cursor<'_>) -> Option<String> {
    cursor.quotable("a name", |text| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if (1..=32).contains(&text.len()) && text.bytes().all(plain) {
            return Ok(text.to_owned());
        }
        Err(Complaint::new(format!(
            "{} is no name for a token: 1 to 32 lower-case letters, digits and -",
            cursor.shown(text)
        )))
    })
}

/// A number with its unit: `500ms`, `5s`, `2m`.
pub(super) fn duration(cursor: &Cursor<'_>, least: Duration, most: Duration) -> Option<Duration> {
    let expected = "a duration such as 500ms, 5s or 2m";
    cursor.text(expected, |text| {
        let shown = cursor.shown(text);
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let to_millis = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            _ => return Err(bad_unit(&shown, number, unit)),
        };
        // A number so large that it overflows is out of every range too.
        let millis = number
            .parse()
            .ok()
            .and_then(|n: u64| n.checked_mul(to_millis));
        let duration = match millis {
            _ if number.is_empty() => {
                return Err(Complaint::new(format!("{shown} is not {expected}")));
            }
            Some(millis) => Duration::from_millis(millis),
            None => Duration::MAX,
        };
        if duration < least || duration > most {
            return Err(Complaint::new(format!(
                "{shown} is out of range: {} to {}",
                spelled(least),
                spelled(most)
            )));
        }
        Ok(duration)
    })
}

fn bad_unit(shown: &str, number: &str, unit: &str) -> Complaint {
    const LONG: [(&str, &str); 12] = [
        ("msec", "ms"),
        ("msecs", "ms"),
        ("millis", "ms"),
        ("milliseconds", "ms"),
        ("sec", "s"),
        ("secs", "s"),
        ("second", "s"),
        ("seconds", "s"),
        ("min", "m"),
        ("mins", "m"),
        ("minute", "m"),
        ("minutes", "m"),
    ];
    if number.is_empty() {
        return Complaint::new(format!("{shown} is not a duration such as 500ms, 5s or 2m"));
    }
    if unit.is_empty() {
        return Complaint::new(format!("{shown} has no unit; the units are ms, s and m"))
            .hint(format!("write {number}ms, {number}s or {number}m"));
    }
    let complaint = Complaint::new(format!(
        "{shown} has an unknown unit; the units are ms, s and m"
    ));
    match nearest(
        &unit.to_ascii_lowercase(),
        LONG.iter().map(|(long, _)| *long),
    )
    .and_then(|near| LONG.iter().find(|(long, _)| *long == near))
    {
        Some((_, short)) => complaint.hint(format!("did you mean `{number}{short}`?")),
        None => complaint,
    }
}

fn spelled(duration: Duration) -> String {
    match duration.as_millis() {
        millis if millis % 60_000 == 0 => format!("{}m", millis / 60_000),
        millis if millis % 1_000 == 0 => format!("{}s", millis / 1_000),
        millis => format!("{millis}ms"),
    }
}

/// The mode of a socket: owner may read and write, group perhaps, others never.
pub(super) fn socket_mode(cursor: &Cursor<'_>) -> Option<u32> {
    let expected = "a mode as octal digits in quotes, such as \"0600\"";
    cursor.quotable(expected, |text| {
        let shown = cursor.shown(text);
        let digits =
            (3..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
        let Some(mode) = digits.then(|| u32::from_str_radix(text, 8).ok()).flatten() else {
            return Err(Complaint::new(format!("{shown} is not {expected}")));
        };
        if mode & 0o007 != 0 {
            return Err(
                Complaint::new(format!("{shown} lets every process on the node connect"))
                    .hint("use \"0600\", or \"0660\" with the client's group as owner's gid"),
            );
        }
        if mode & 0o7000 != 0 || mode & 0o111 != 0 {
            return Err(Complaint::new(format!(
                "{shown} has bits that mean nothing for a socket; use \"0600\" or \"0660\""
            )));
        }
        if mode & 0o600 != 0o600 {
            return Err(Complaint::new(format!(
                "{shown} keeps the owner out: connecting needs to read and write"
            )));
        }
        Ok(mode)
    })
}

/// `uid:gid`, as numbers: the node's extension has no user database.
pub(super) fn owner(cursor: &Cursor<'_>) -> Option<(u32, u32)> {
    let expected = "an owner as numbers, \"UID:GID\"";
    cursor.text(expected, |text| {
        // u32::from_str would take a leading `+`; and -1 as u32 means "leave it" to chown.
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain
                .then(|| digits.parse().ok())
                .flatten()
                .filter(|id| *id != u32::MAX)
        };
        text.split_once(':')
            .and_then(|(uid, gid)| Some((number(uid)?, number(gid)?)))
            .ok_or_else(|| {
                Complaint::new(format!("{} is not {expected}", cursor.shown(text)))
                    .hint("for kube-apiserver it is \"65534:65534\"")
            })
    })
}

/// A PKCS#11 URI.
pub(super) fn uri(cursor: &Cursor<'_>) -> Option<Uri> {
    cursor.text("a PKCS#11 URI", |text| {
        // The cause names what is wrong in it.
        Uri::parse(text).map_err(|cause| {
            Complaint::new("not a PKCS#11 URI (RFC 7512) that can be used here").because(cause)
        })
    })
}
