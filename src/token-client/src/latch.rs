//! Notes on refused PINs, so that no restart tries one again and locks the token.
//!
//! A note says: a PIN of this generation was refused by the token with this serial number. It and
//! every lower generation stay refused; a raised `pin.generation` in the configuration is how a
//! person says that the PIN is another one now. Each state folder that exists or can be made holds
//! the same notes: one of them survives a reboot, the other is there before disks are.
//!
//! *Guarantees:* a note is on the disk before [`Latch::write`] returns, whole or not at all. A note
//! that cannot be read, or a folder that cannot be listed, is an error and no login is tried: what
//! it would have said is unknown.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hsm_wire::host::MAX_LATCH_NOTES;
use hsm_wire::identity::hex;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::text;

const FOLDER: &str = "pin-latch";
const FIRST_LINE: &str = "talos-hsm PIN latch 1";
/// Longest note: a token URI of 2048 bytes, each written as three, and a reason.
const MAX_NOTE_LEN: u64 = 16 * 1024;
const NOFOLLOW: i32 = nix::fcntl::OFlag::O_NOFOLLOW.bits();

/// One refused PIN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    /// Serial number of the token; `uri:` and its URI where no serial number was known.
    pub(crate) token: String,
    pub(crate) generation: u32,
    pub(crate) reason: String,
    pub(crate) time: SystemTime,
}

/// The newest note for each token.
pub(crate) type Notes = BTreeMap<String, Note>;

/// Why it is not known which PINs were refused.
#[derive(Debug, Error)]
pub(crate) enum LatchError {
    #[error(
        "the notes on refused PINs in {} cannot be read; no login is tried until they can",
        path.display()
    )]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the note on a refused PIN {} is damaged ({what}); no login is tried while it is there: \
         remove it if the PIN is known to be right",
        path.display()
    )]
    Damaged { path: PathBuf, what: &'static str },
    #[error(
        "there are notes on refused PINs of {0} tokens, over the limit of {MAX_LATCH_NOTES}; no \
         login is tried: remove those of tokens that are gone"
    )]
    TooMany(usize),
}

/// The state folders of one token.
#[derive(Debug, Clone)]
pub(crate) struct Latch {
    folders: Vec<PathBuf>,
}

impl Latch {
    pub(crate) fn new(state_dirs: &[PathBuf]) -> Self {
        let folders = state_dirs.iter().map(|dir| dir.join(FOLDER)).collect();
        Self { folders }
    }

    /// What was noted in any folder; the highest generation counts for each token.
    pub(crate) fn read(&self) -> Result<Notes, LatchError> {
        let mut notes = Notes::new();
        for folder in &self.folders {
            for path in files(folder)? {
                let note = read_note(&path)?;
                match notes.get(&note.token) {
                    Some(known) if known.generation >= note.generation => {}
                    _ => drop(notes.insert(note.token.clone(), note)),
                }
            }
        }
        if notes.len() > MAX_LATCH_NOTES {
            return Err(LatchError::TooMany(notes.len()));
        }
        Ok(notes)
    }

    /// Writes a note into each folder, and says where that failed.
    pub(crate) fn write(&self, note: &Note) -> Vec<(PathBuf, io::Error)> {
        let write = |folder: &PathBuf| {
            let failed = write_note(folder, note).err()?;
            Some((folder.clone(), failed))
        };
        self.folders.iter().filter_map(write).collect()
    }

    /// How many folders there should be.
    pub(crate) fn folders(&self) -> usize {
        self.folders.len()
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, LatchError> {
    let unreadable = |source| LatchError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(unreadable)?;
        // Names with a dot in front are notes that were being written when the power went.
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn read_note(path: &Path) -> Result<Note, LatchError> {
    let mut text = String::new();
    let read = OpenOptions::new()
        .read(true)
        .custom_flags(NOFOLLOW)
        .open(path)
        .and_then(|file| file.take(MAX_NOTE_LEN + 1).read_to_string(&mut text));
    match read {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(LatchError::Damaged {
                path: path.to_owned(),
                what: "not text",
            });
        }
        Err(source) => {
            return Err(LatchError::Unreadable {
                path: path.to_owned(),
                source,
            });
        }
    }
    parse(&text).map_err(|what| LatchError::Damaged {
        path: path.to_owned(),
        what,
    })
}

fn parse(text: &str) -> Result<Note, &'static str> {
    if text.len() as u64 > MAX_NOTE_LEN {
        return Err("too long");
    }
    // A note that was cut has no newline at its end.
    let body = text.strip_suffix('\n').ok_or("cut short")?;
    let mut lines = body.split('\n');
    if lines.next() != Some(FIRST_LINE) {
        return Err("unknown first line");
    }
    let mut field = |name: &str| {
        let line = lines.next()?;
        line.strip_prefix(name)?.strip_prefix('=')
    };
    let token = unescape(field("token").ok_or("no token")?).ok_or("bad token")?;
    let generation = field("generation").ok_or("no generation")?;
    let seconds = field("time").ok_or("no time")?;
    let reason = field("reason").ok_or("no reason")?.to_owned();
    if lines.next().is_some() {
        return Err("more lines than there should be");
    }
    let time = seconds
        .parse()
        .ok()
        .and_then(|s| UNIX_EPOCH.checked_add(Duration::from_secs(s)))
        .ok_or("bad time")?;
    Ok(Note {
        token,
        generation: generation.parse().map_err(|_| "bad generation")?,
        reason,
        time,
    })
}

fn render(note: &Note) -> String {
    let seconds = note
        .time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    format!(
        "{FIRST_LINE}\ntoken={}\ngeneration={}\ntime={seconds}\nreason={}\n",
        escape(&note.token),
        note.generation,
        text::printable(&note.reason),
    )
}

fn write_note(folder: &Path, note: &Note) -> io::Result<()> {
    if let Some(state_dir) = folder.parent()
        && !state_dir.exists()
    {
        // Other files of ours, sockets too, may live beside the notes: only the notes are private.
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(state_dir)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let path = folder.join(file_name(&note.token));
    if read_note(&path).is_ok_and(|old| old.generation > note.generation) {
        return Ok(());
    }
    let unfinished = folder.join(format!(
        ".{}.{}",
        file_name(&note.token),
        std::process::id()
    ));
    let result = write_through(&unfinished, render(note).as_bytes())
        .and_then(|()| fs::rename(&unfinished, &path))
        .and_then(|()| File::open(folder)?.sync_all());
    if result.is_err() {
        // Best effort: readers pass over names with a dot in front.
        let _ = fs::remove_file(&unfinished);
    }
    result
}

fn write_through(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(NOFOLLOW)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Readable for a person, and different for different tokens: a token chooses its serial number,
/// so what is readable of it is not enough.
fn file_name(token: &str) -> String {
    let readable: String = token
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .take(40)
        .collect();
    let digest = Sha256::digest(token.as_bytes());
    format!("{readable}-{}", hex(&digest[..8]))
}

fn escape(text: &str) -> String {
    text.bytes()
        .fold(String::with_capacity(text.len()), |mut out, b| {
            match b {
                b'%' | 0..0x20 | 0x7f.. => {
                    out.push('%');
                    out.push_str(&hex(&[b]));
                }
                _ => out.push(char::from(b)),
            }
            out
        })
}

fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        if b == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            rest = tail;
            let digits = std::str::from_utf8(digits).ok()?;
            out.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn note(token: &str, generation: u32) -> Note {
        Note {
            token: token.into(),
            generation,
            reason: "the token refused the PIN (C_Login: CKR_PIN_INCORRECT)".into(),
            time: UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        }
    }

    fn latch(folder: &tempfile::TempDir) -> (Latch, PathBuf, PathBuf) {
        let (run, var) = (folder.path().join("run/hsm"), folder.path().join("var/hsm"));
        (Latch::new(&[run.clone(), var.clone()]), run, var)
    }

    #[test]
    fn a_note_is_read_back_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, var) = latch(&folder);
        assert!(latch.read().unwrap().is_empty());
        for token in ["abc", "uri:pkcs11:token=a%20b", "né\n=", ""] {
            let note = note(token, 3);
            assert!(latch.write(&note).is_empty());
            assert_eq!(latch.read().unwrap()[token], note);
        }
        for dir in [run, var] {
            let notes = dir.join(FOLDER);
            assert_eq!(
                notes.metadata().unwrap().permissions().mode() & 0o777,
                0o700
            );
            let paths = files(&notes).unwrap();
            assert_eq!(paths.len(), 4);
            for path in paths {
                assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            }
        }
    }

    #[test]
    fn the_bytes_of_a_note_are_these() {
        assert_eq!(
            render(&note("5f1c", 2)),
            "talos-hsm PIN latch 1\ntoken=5f1c\ngeneration=2\ntime=1800000000\n\
             reason=the token refused the PIN (C_Login: CKR_PIN_INCORRECT)\n"
        );
        assert_eq!(file_name("a/b"), "a_b-c14cddc033f64b9d");
    }

    #[test]
    fn the_highest_generation_of_any_folder_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, var) = latch(&folder);
        Latch::new(&[run]).write(&note("a", 4));
        Latch::new(&[var]).write(&note("a", 7));
        assert_eq!(latch.read().unwrap()["a"].generation, 7);
        latch.write(&note("a", 5));
        assert_eq!(
            latch.read().unwrap()["a"].generation,
            7,
            "a note never goes back"
        );
    }

    #[test]
    fn a_folder_that_cannot_be_written_does_not_keep_the_other_from_it() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, _) = latch(&folder);
        fs::create_dir_all(run.parent().unwrap()).unwrap();
        fs::write(&run, "a file where the folder should be").unwrap();
        let failed = latch.write(&note("a", 1));
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, run.join(FOLDER));
    }

    #[test]
    fn a_damaged_note_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, _) = latch(&folder);
        latch.write(&note("abc", 1));
        let path = run.join(FOLDER).join(file_name("abc"));
        let whole = fs::read_to_string(&path).unwrap();
        for damaged in [
            String::new(),
            whole[..whole.len() - 1].to_owned(),
            whole.replace("generation=1", "generation=-1"),
            whole.replace("generation=1", "generation=4294967296"),
            whole.replace("latch 1", "latch 2"),
            whole.replace("token=abc", "token=%4"),
            whole.clone() + "more=1\n",
            "\0".repeat(MAX_NOTE_LEN as usize + 5),
        ] {
            fs::write(&path, &damaged).unwrap();
            let error = latch.read().unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
            assert!(error.contains("no login is tried"), "{error}");
        }
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(latch.read(), Err(LatchError::Damaged { .. })));
    }

    #[test]
    fn what_is_not_a_plain_file_in_a_plain_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, _) = latch(&folder);
        fs::create_dir_all(run.join(FOLDER).join("folder")).unwrap();
        assert!(matches!(latch.read(), Err(LatchError::Unreadable { .. })));
        fs::remove_dir_all(&run).unwrap();
        fs::create_dir_all(run.join(FOLDER)).unwrap();
        std::os::unix::fs::symlink("/dev/null", run.join(FOLDER).join("link")).unwrap();
        assert!(matches!(latch.read(), Err(LatchError::Unreadable { .. })));
        fs::remove_dir_all(&run).unwrap();
        fs::write(&run, "").unwrap();
        assert!(matches!(latch.read(), Err(LatchError::Unreadable { .. })));
    }

    #[test]
    fn an_unfinished_note_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let (latch, run, _) = latch(&folder);
        latch.write(&note("a", 1));
        fs::write(run.join(FOLDER).join(".a-1.77"), "talos").unwrap();
        assert_eq!(latch.read().unwrap().len(), 1);
    }
}
