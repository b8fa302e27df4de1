//! The paths that a source names, read from its text: no compiler, no macro expansion.

/// Identifiers, `::`, and single other characters. Comments, strings and characters are left out.
pub(crate) fn tokens(source: &str) -> Vec<&str> {
    let bytes = source.as_bytes();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            at += block_comment(rest);
        } else if let Some(len) = literal(rest) {
            at += len;
        } else if rest.starts_with("::") {
            found.push("::");
            at += 2;
        } else if is_name(bytes[at]) {
            let len = rest
                .bytes()
                .position(|byte| !is_name(byte))
                .unwrap_or(rest.len());
            found.push(&rest[..len]);
            at += len;
        } else {
            if !bytes[at].is_ascii_whitespace() {
                found.push(&rest[..1]);
            }
            at += 1;
        }
    }
    found
}

/// Length of the block comment that `rest` begins with; they nest.
fn block_comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest.as_bytes()[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.as_bytes()[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// Length of the string or character that `rest` begins with. A lifetime is none.
fn literal(rest: &str) -> Option<usize> {
    let unprefixed = rest.trim_start_matches(['b', 'c', 'r']);
    let prefix = rest.len() - unprefixed.len();
    if prefix > 2 {
        return None;
    }
    let hashes = unprefixed.len() - unprefixed.trim_start_matches('#').len();
    if rest[..prefix].ends_with('r') {
        let body = unprefixed[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let len = body.find(&end).map_or(body.len(), |at| at + end.len());
        return Some(prefix + hashes + 1 + len);
    }
    let quote = unprefixed
        .chars()
        .next()
        .filter(|c| matches!(c, '"' | '\''))?;
    let mut chars = unprefixed.char_indices().skip(1).peekable();
    if quote == '\'' {
        let (_, first) = chars.next()?;
        let (_, second) = *chars.peek()?;
        if first != '\\' && second != '\'' {
            return None;
        }
        chars = unprefixed.char_indices().skip(1).peekable();
    }
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            _ if c == quote => return Some(prefix + at + 1),
            _ => {}
        }
    }
    Some(rest.len())
}

/// Every path in `source`, groups spread out and `self`, `super` resolved, for the module `here`
/// (`[]` is the crate's root): `crate::kms::Face`, `std::fs`.
pub(crate) fn paths(source: &str, here: &[&str]) -> Vec<String> {
    let tokens = tokens(source);
    let mut found = Vec::new();
    // Modules written inside the file, each with the depth of braces at which it ends.
    let mut inner: Vec<(usize, &str)> = Vec::new();
    let mut depth = 0;
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at] {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inner.retain(|(opened_at, _)| *opened_at <= depth);
            }
            "mod" if tokens.get(at + 2) == Some(&"{") => {
                inner.push((depth + 1, tokens[at + 1]));
            }
            name if tokens.get(at + 1) == Some(&"::") && is_identifier(name) => {
                let mut spread = Vec::new();
                at = spread_path(&tokens, at, &mut Vec::new(), &mut spread);
                let module: Vec<&str> = here
                    .iter()
                    .copied()
                    .chain(inner.iter().map(|(_, name)| *name))
                    .collect();
                found.extend(spread.iter().map(|path| resolve(path, &module)));
                continue;
            }
            // `use {a::b, c};` has its paths found above; `use config;` is a path of one name, and
            // so is `use config as c;`.
            "use" if matches!(tokens.get(at + 2), Some(&(";" | "as"))) => {
                found.push(tokens[at + 1].to_owned());
            }
            _ => {}
        }
        at += 1;
    }
    found
}

fn is_identifier(token: &str) -> bool {
    token
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
}

/// Reads one path, or the tree of a `use`, that begins at `at`; returns where it ends.
fn spread_path<'a>(
    tokens: &[&'a str],
    mut at: usize,
    prefix: &mut Vec<&'a str>,
    found: &mut Vec<Vec<&'a str>>,
) -> usize {
    let outer = prefix.len();
    while let Some(&token) = tokens.get(at) {
        if is_identifier(token) || token == "*" {
            prefix.push(token);
            at += 1;
            if tokens.get(at) == Some(&"::") {
                at += 1;
                continue;
            }
            found.push(prefix.clone());
        } else if token == "{" {
            at += 1;
            while let Some(&token) = tokens.get(at)
                && token != "}"
            {
                at = match token {
                    "," => at + 1,
                    // `a as b`
                    "as" => at + 2,
                    _ => spread_path(tokens, at, prefix, found).max(at + 1),
                };
            }
            at += 1;
        } else {
            // `Vec::<u8>`
            found.push(prefix.clone());
        }
        break;
    }
    prefix.truncate(outer);
    at
}

fn resolve(path: &[&str], module: &[&str]) -> String {
    let mut module = module.to_vec();
    let mut names = path.iter().copied().peekable();
    let relative = matches!(names.peek(), Some(&("self" | "super")));
    while let Some(&step @ ("self" | "super")) = names.peek() {
        if step == "super" {
            module.pop();
        }
        names.next();
    }
    let names: Vec<&str> = if relative {
        ["crate"].into_iter().chain(module).chain(names).collect()
    } else {
        names.collect()
    };
    names.join("::")
}
