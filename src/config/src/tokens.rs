//! The `tokens` section: which HSMs there are, how to log in, and how their module hosts start.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hsm_token_client as client;
use hsm_wire::uri::Uri;

use crate::pin;
use crate::reader::{Complaint, Cursor, Fields};
use crate::values;

/// More tokens than any node has; each costs a process.
const MAX_TOKENS: usize = 8;
const MAX_PATHS: usize = 32;
const MAX_ENV: usize = 64;

/// The module host's user unless the file says otherwise. Nothing on Talos has it.
const HOST_ID: u32 = 64500;

/// One token as the file describes it. Equal values need no new host.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// In logs, health and metrics.
    pub name: String,
    /// Token attributes only.
    pub uri: Uri,
    /// The vendor's module.
    pub module: PathBuf,
    /// How to log in.
    pub pin: Pin,
    /// Session threads in the host.
    pub sessions: u16,
    /// A vendor call that takes longer is stuck.
    pub call_timeout: Duration,
    /// How the host starts.
    pub launch: client::Launch,
}

/// Where the PIN is, and how often it was changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Pin {
    /// Where it is read for each host that starts.
    pub source: pin::Source,
    /// A refused PIN is tried again only under a higher one.
    pub generation: u32,
}

impl Token {
    /// For the crate that runs tokens. `pin` reads what [`Pin::source`] describes.
    pub fn to_client(
        &self,
        state_dirs: &[PathBuf],
        pin: Arc<dyn client::PinSource>,
    ) -> client::Config {
        client::Config {
            name: self.name.clone(),
            uri: self.uri.to_string(),
            module: self.module.clone(),
            sessions: self.sessions,
            call_timeout: self.call_timeout,
            pin: Some(pin),
            pin_generation: self.pin.generation,
            state_dirs: state_dirs.to_vec(),
            launch: self.launch.clone(),
        }
    }
}

pub(super) fn read(cursor: &Cursor<'_>) -> Option<Vec<Token>> {
    let mut names: Vec<String> = Vec::new();
    cursor.each(1..=MAX_TOKENS, |item| token(item, &mut names))
}

fn token(cursor: &Cursor<'_>, names: &mut Vec<String>) -> Option<Token> {
    let fields = cursor.fields(&[
        "name",
        "uri",
        "module",
        "pin",
        "sessions",
        "call_timeout",
        "host",
    ])?;
    let name = fields.required("name", "name: main", |cursor| {
        let name = values::token_name(cursor)?;
        if names.contains(&name) {
            return cursor.complain(Complaint::new(format!(
                "a token before is named `{name}` too"
            )));
        }
        names.push(name.clone());
        Some(name)
    });
    let uri = fields.required("uri", "uri: pkcs11:token=LABEL", uri);
    let module = fields.required(
        "module",
        "module: /path/of/the/vendor's/module.so",
        values::path,
    );
    let pin = fields.required("pin", "pin: {file: /etc/hsm/pin}", pin);
    let sessions = fields.or("sessions", 4, |cursor| cursor.integer(1..=64));
    let call_timeout = fields.or("call_timeout", Duration::from_secs(2), |cursor| {
        values::duration(cursor, Duration::from_millis(100), Duration::from_secs(60))
    });
    let launch = match fields.get("host") {
        Some(cursor) => launch(cursor),
        None => Some(default_launch()),
    };
    Some(Token {
        name: name?,
        uri: uri?,
        module: module?,
        pin: pin?,
        sessions: sessions?.try_into().ok()?,
        call_timeout: call_timeout?,
        launch: launch?,
    })
}

fn uri(cursor: &Cursor<'_>) -> Option<Uri> {
    let uri = values::uri(cursor)?;
    if uri.names_object() {
        return cursor.complain(
            Complaint::new("names an object; a token's URI has token attributes only")
                .hint("leave out object, id and type; a key is named in kms.keys"),
        );
    }
    Some(uri)
}

/// May a token with this URI hold what the other names? Attributes that only one of them gives say
/// nothing until the token answers.
pub(super) fn may_hold(token: &Uri, key: &Uri) -> bool {
    fn agree<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> bool {
        one.is_none() || other.is_none() || one == other
    }
    agree(token.token.as_ref(), key.token.as_ref())
        && agree(token.serial.as_ref(), key.serial.as_ref())
        && agree(token.manufacturer.as_ref(), key.manufacturer.as_ref())
        && agree(token.model.as_ref(), key.model.as_ref())
        && agree(token.slot_id.as_ref(), key.slot_id.as_ref())
}

fn pin(cursor: &Cursor<'_>) -> Option<Pin> {
    const WHERE: &str = "the PIN itself is never written here; put it into a file that only root can read, and name that: `pin: {file: /etc/hsm/pin}`";
    let cursor = cursor.quiet();
    if !cursor.is_map() {
        return cursor.complain(
            Complaint::new("expected where the PIN is: one of the fields file, fd, credential")
                .hint(WHERE),
        );
    }
    let fields = cursor.fields(&[
        "file",
        "fd",
        "credential",
        "generation",
        "allow_world_readable",
    ])?;
    let generation = fields.or("generation", 1, |cursor| cursor.integer(1..=u32::MAX));
    let world_readable = fields.or("allow_world_readable", false, |cursor| {
        let value = cursor.boolean()?;
        if fields.get("file").is_none() {
            return cursor.complain(Complaint::new("goes with `file` only"));
        }
        Some(value)
    });
    let given = ["file", "fd", "credential"].map(|name| fields.get(name));
    let source = match given {
        [Some(file), None, None] => values::path(file).map(|path| {
            pin::Source::File(pin::PinFile {
                path,
                allow_world_readable: world_readable.unwrap_or(false),
            })
        }),
        [None, Some(fd), None] => fd
            // 0 to 2 are the standard streams.
            .integer(3..=65_535)
            .map(|fd| pin::Source::Fd(pin::PinFd { fd })),
        [None, None, Some(name)] => credential(name),
        [None, None, None]
            if ["file", "fd", "credential"]
                .iter()
                .any(|name| fields.means(name)) =>
        {
            None
        }
        [None, None, None] => cursor.complain(
            Complaint::new(
                "says nowhere the PIN is: one of the fields file, fd, credential is needed",
            )
            .hint(WHERE),
        ),
        _ => cursor.complain(Complaint::new(
            "names several places; the PIN is in exactly one of file, fd, credential",
        )),
    };
    world_readable?;
    Some(Pin {
        source: source?,
        generation: generation?,
    })
}

fn credential(cursor: &Cursor<'_>) -> Option<pin::Source> {
    cursor.quotable("the name of a credential", |text| {
        let plain = !text.is_empty() && text.len() <= 255 && text != "." && text != "..";
        if plain && !text.contains(['/', '\0']) {
            return Ok(pin::Source::Credential(pin::PinCredential {
                name: text.to_owned(),
            }));
        }
        Err(Complaint::new(
            "not the name of a file in $CREDENTIALS_DIRECTORY: at least one character, no `/`",
        ))
    })
}

fn default_launch() -> client::Launch {
    client::Launch {
        program: beside_this_program(),
        loader: None,
        isolation: Some(client::Isolation {
            uid: HOST_ID,
            gid: HOST_ID,
            read_only: Vec::new(),
            read_write: Vec::new(),
        }),
        env: Vec::new(),
    }
}

/// The two programs are shipped together. Should our own path be unknown, the system's folder is as
/// good a guess as any; that nothing is there shows when the host is started.
fn beside_this_program() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/bin/hsmd"));
    own.with_file_name("hsm-token")
}

fn launch(cursor: &Cursor<'_>) -> Option<client::Launch> {
    let fields = cursor.fields(&[
        "program",
        "loader",
        "library_path",
        "uid",
        "gid",
        "env",
        "read_only",
        "read_write",
    ])?;
    let program = match fields.get("program") {
        Some(cursor) => values::path(cursor),
        None => Some(beside_this_program()),
    };
    let loader = loader(&fields);
    let uid = fields.or("uid", HOST_ID, |cursor| not_root(cursor, "uid"));
    // A uid of one's own with the default's group would be a surprise.
    let gid = match fields.get("gid") {
        Some(cursor) => not_root(cursor, "gid"),
        None => uid,
    };
    let read_only = fields.or("read_only", Vec::new(), |c| {
        c.each(0..=MAX_PATHS, values::path)
    });
    let read_write = fields.or("read_write", Vec::new(), |c| {
        c.each(0..=MAX_PATHS, values::path)
    });
    let env = fields.or("env", Vec::new(), env);
    Some(client::Launch {
        program: program?,
        loader: loader?,
        isolation: Some(client::Isolation {
            uid: uid?,
            gid: gid?,
            read_only: read_only?,
            read_write: read_write?,
        }),
        env: env?,
    })
}

fn loader(fields: &Fields<'_>) -> Option<Option<client::Loader>> {
    let ld_so = fields.optional("loader", values::path);
    let library_path = fields.optional("library_path", |cursor| {
        cursor.each(1..=MAX_PATHS, |item| {
            let path = values::path(item)?;
            if path.as_os_str().as_encoded_bytes().contains(&b':') {
                return item.complain(Complaint::new(
                    "contains `:`, which separates folders in the loader's argument",
                ));
            }
            Some(path)
        })
    });
    match (ld_so?, library_path?) {
        (Some(ld_so), Some(library_path)) => Some(Some(client::Loader {
            ld_so,
            library_path,
        })),
        (None, None) => Some(None),
        (Some(_), None) => fields.get("loader")?.complain(
            Complaint::new("a loader of its own needs `library_path` too")
                .hint("list the folders of the libraries that belong to it, libc's first"),
        ),
        (None, Some(_)) => fields.get("library_path")?.complain(
            Complaint::new("goes with `loader` only").hint(
                "name the ld-linux….so.2 that belongs to these libraries, or set LD_LIBRARY_PATH in env",
            ),
        ),
    }
}

fn not_root(cursor: &Cursor<'_>, what: &str) -> Option<u32> {
    // The kernel reads the highest one as "leave it as it is", which is root's.
    let id = cursor.integer(0..=u32::MAX - 1)?;
    if id == 0 {
        return cursor.complain(
            Complaint::new(format!("{what} 0: a module host never runs as root")).hint(format!(
                "choose one that nothing else on the node has, such as {HOST_ID}"
            )),
        );
    }
    Some(id)
}

fn env(cursor: &Cursor<'_>) -> Option<Vec<(String, String)>> {
    let entries = cursor.entries()?;
    if entries.len() > MAX_ENV {
        return cursor.complain(Complaint::new(format!("more than {MAX_ENV} variables")));
    }
    let mut env = Vec::new();
    for (name, cursor) in entries {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if name.is_empty() || !name.bytes().all(plain) || name.as_bytes()[0].is_ascii_digit() {
            cursor.complain::<()>(Complaint::new(
                "no name for a variable: letters, digits and _ that do not begin with a digit",
            ));
        }
        let value = cursor
            .quiet()
            .quotable("text", |text| match text.contains('\0') {
                true => Err(Complaint::new("contains a zero byte")),
                false => Ok(text.to_owned()),
            });
        env.extend(value.map(|value| (name.to_owned(), value)));
    }
    Some(env)
}
