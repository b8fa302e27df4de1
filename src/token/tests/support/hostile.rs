//! The module of `tests/hostile/module.c`, compiled once per test program, and its control folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use hsm_wire::host::Open;
use tempfile::TempDir;

use super::{Host, SoftHsm, Start, give_away, open_module};

/// A SoftHSM token behind the hostile module.
pub(crate) struct Hostile {
    pub(crate) token: SoftHsm,
    /// `control`, `trace` and `report` are in it.
    pub(crate) folder: TempDir,
}

impl Hostile {
    pub(crate) fn new() -> Self {
        let folder = TempDir::with_prefix("hsm-token-hostile-").expect("temporary folder");
        give_away(folder.path());
        Self {
            token: SoftHsm::new(),
            folder,
        }
    }

    /// Replaces the rules; takes effect with the module's next call.
    pub(crate) fn rules(&self, rules: &str) {
        fs::write(self.folder.path().join("control"), rules).expect("control");
        give_away(self.folder.path());
    }

    /// How often a function was called.
    pub(crate) fn calls(&self, function: &str) -> usize {
        let trace = fs::read_to_string(self.folder.path().join("trace")).unwrap_or_default();
        trace.lines().filter(|line| *line == function).count()
    }

    /// What the module found when it looked around.
    pub(crate) fn report(&self) -> String {
        fs::read_to_string(self.folder.path().join("report")).unwrap_or_default()
    }

    pub(crate) fn start(&self) -> Start {
        let mut env = self.token.env();
        env.push((
            "HOSTILE_DIR".to_owned(),
            self.folder.path().display().to_string(),
        ));
        Start::isolated(
            env,
            &[&self.token.conf()],
            &[&self.token.tokens(), self.folder.path()],
        )
    }

    pub(crate) fn open_request(&self) -> Open {
        open_module(module())
    }

    /// A host with the token open.
    pub(crate) fn host(&self) -> Host {
        Host::open(&self.start(), self.open_request())
    }

    /// The same with one session thread, so that a rule meets the request it is meant for.
    pub(crate) fn host_with_one_session(&self) -> Host {
        let mut open = self.open_request();
        open.sessions = 1;
        Host::open(&self.start(), open)
    }
}

/// The compiled module.
pub(crate) fn module() -> &'static Path {
    static MODULE: OnceLock<PathBuf> = OnceLock::new();
    MODULE.get_or_init(|| {
        // Under the temporary folder of the target, which nobody but root can change. By rename:
        // another test program may do the same now.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile");
        fs::create_dir_all(&folder).expect("folder");
        let new = folder.join(format!("hostile.so.{}", std::process::id()));
        let module = folder.join("hostile.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/module.c");
        let compiled = Command::new("cc")
            .args(["-Wall", "-O1", "-shared", "-fPIC", "-o"])
            .arg(&new)
            .args([source, "-ldl"])
            .status()
            .expect("`cc` is missing: apt-get install gcc libc6-dev");
        assert!(compiled.success(), "the hostile module does not compile");
        fs::rename(&new, &module).expect("rename");
        module
    })
}
