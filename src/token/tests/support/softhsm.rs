//! A token in a temporary folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{ID, KEY_LABEL, LABEL, PIN, SOFTHSM};

/// A token in a folder that the module's user owns.
pub(crate) struct SoftHsm {
    pub(crate) folder: TempDir,
}

impl SoftHsm {
    /// A token with one AES-256 key, label [`KEY_LABEL`], id 01.
    pub(crate) fn new() -> Self {
        let this = Self::without_key();
        this.add_key(KEY_LABEL, "01");
        this
    }

    pub(crate) fn without_key() -> Self {
        for (program, package) in [("softhsm2-util", "softhsm2"), ("pkcs11-tool", "opensc")] {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path).any(|folder| folder.join(program).exists())
            });
            assert!(found, "`{program}` is missing: apt-get install {package}");
        }
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests need root: they make namespaces and change the user"
        );
        let folder = TempDir::with_prefix("hsm-token-test-").expect("temporary folder");
        let this = Self { folder };
        fs::create_dir(this.tokens()).expect("token folder");
        fs::write(
            this.conf(),
            format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                this.tokens().display()
            ),
        )
        .expect("softhsm2.conf");
        this.run(
            "softhsm2-util",
            &[
                "--init-token",
                "--free",
                "--label",
                LABEL,
                "--pin",
                PIN,
                "--so-pin",
                "87654321",
            ],
        );
        this.give_away();
        this
    }

    /// Another AES-256 key, as `pkcs11-tool` makes it.
    pub(crate) fn add_key(&self, label: &str, id: &str) {
        self.run(
            "pkcs11-tool",
            &[
                "--module",
                SOFTHSM,
                "--token-label",
                LABEL,
                "--login",
                "--pin",
                PIN,
                "--keygen",
                "--key-type",
                "AES:32",
                "--label",
                label,
                "--id",
                id,
                "--sensitive",
            ],
        );
        self.give_away();
    }

    pub(crate) fn tokens(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.folder.path().join("softhsm2.conf")
    }

    pub(crate) fn env(&self) -> Vec<(String, String)> {
        vec![(
            "SOFTHSM2_CONF".to_owned(),
            self.conf().display().to_string(),
        )]
    }

    /// The serial number, as softhsm2-util shows it.
    pub(crate) fn serial(&self) -> String {
        let slots = self.run("softhsm2-util", &["--show-slots"]);
        slots
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Serial number:"))
            .map(|serial| serial.trim().to_owned())
            .find(|serial| !serial.is_empty())
            .expect("a serial number")
    }

    pub(crate) fn run(&self, program: &str, args: &[&str]) -> String {
        let output = Command::new(program)
            .args(args)
            .env("SOFTHSM2_CONF", self.conf())
            .output()
            .unwrap_or_else(|error| panic!("`{program}` does not start: {error}"));
        assert!(
            output.status.success(),
            "{program} {args:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// To the module's user.
    pub(crate) fn give_away(&self) {
        give_away(&self.tokens());
    }
}

/// Makes `path` and all below it the module's user's.
pub(crate) fn give_away(path: &Path) {
    std::os::unix::fs::chown(path, Some(ID), Some(ID)).expect("chown");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("read folder") {
            give_away(&entry.expect("entry").path());
        }
    }
}
