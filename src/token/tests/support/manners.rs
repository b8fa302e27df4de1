//! The module of `tests/manners/module.c`, and the tokens behind it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::{Host, KEY_LABEL, LABEL, PIN, SOFTHSM, SoftHsm, Start, give_away, open_module};

/// A software token, seen through the module that imitates others.
pub(crate) struct Mannered {
    module: PathBuf,
    env: Vec<(String, String)>,
    read_only: Vec<PathBuf>,
    read_write: Vec<PathBuf>,
    _folder: Box<dyn std::any::Any>,
}

impl Mannered {
    /// SoftHSM with the wrapping key of [`SoftHsm::new`].
    pub(crate) fn softhsm() -> Self {
        let token = SoftHsm::new();
        Self {
            module: SOFTHSM.into(),
            env: token.env(),
            read_only: vec![token.conf()],
            read_write: vec![token.tokens()],
            _folder: Box::new(token),
        }
    }

    /// Kryoptic with the same.
    pub(crate) fn kryoptic() -> Self {
        let module = std::env::var_os("HSM_TEST_KRYOPTIC").map(PathBuf::from);
        let module = module.filter(|path| path.exists()).expect(
            "HSM_TEST_KRYOPTIC must name Kryoptic's module: \
             export HSM_TEST_KRYOPTIC=$(. hack/lib/parts.sh && part kryoptic)",
        );
        let folder = TempDir::with_prefix("hsm-token-kryoptic-").expect("temporary folder");
        let tokens = folder.path().join("tokens");
        fs::create_dir(&tokens).expect("token folder");
        let conf = folder.path().join("kryoptic.conf");
        let text = format!(
            "[[slots]]\nslot = 7\ndbtype = \"sqlite\"\ndbargs = \"{}/token.sql\"\n",
            tokens.display()
        );
        fs::write(&conf, text).expect("kryoptic.conf");
        let this = Self {
            module,
            env: vec![("KRYOPTIC_CONF".to_owned(), conf.display().to_string())],
            read_only: vec![conf],
            read_write: vec![tokens],
            _folder: Box::new(folder),
        };
        this.tool(&[
            "--init-token",
            "--slot",
            "7",
            "--label",
            LABEL,
            "--so-pin",
            "87654321",
        ]);
        this.tool(&[
            "--init-pin",
            "--login",
            "--login-type",
            "so",
            "--token-label",
            LABEL,
            "--so-pin",
            "87654321",
            "--new-pin",
            PIN,
        ]);
        this.add("AES:32", KEY_LABEL, "01", &["--sensitive"]);
        this
    }

    /// Another key, as `pkcs11-tool` makes it.
    pub(crate) fn add(&self, kind: &str, label: &str, id: &str, more: &[&str]) {
        let what = if kind.starts_with("rsa") {
            &["--keypairgen", "--usage-decrypt"][..]
        } else if kind.starts_with("AES") {
            &[
                "--keygen",
                "--usage-sign",
                "--usage-decrypt",
                "--usage-wrap",
            ][..]
        } else {
            &["--keygen", "--usage-sign"][..]
        };
        let mut args = vec!["--token-label", LABEL, "--login", "--pin", PIN];
        args.extend(what);
        args.extend(["--key-type", kind, "--label", label, "--id", id]);
        args.extend(more);
        self.tool(&args);
    }

    /// A key for HMAC beside the wrapping key with this id.
    pub(crate) fn add_mac_key(&self, id: &str) {
        self.add("GENERIC:32", "mac", id, &["--sensitive"]);
    }

    /// Gives the secret key of this label another id.
    pub(crate) fn change_id(&self, label: &str, id: &str, new: &str) {
        self.tool(&[
            "--token-label",
            LABEL,
            "--login",
            "--pin",
            PIN,
            "--type",
            "secrkey",
            "--label",
            label,
            "--id",
            id,
            "--set-id",
            new,
        ]);
    }

    fn tool(&self, args: &[&str]) {
        let output = Command::new("pkcs11-tool")
            .arg("--module")
            .arg(&self.module)
            .args(args)
            .envs(self.env.iter().cloned())
            .output()
            .expect("`pkcs11-tool` is missing: apt-get install opensc");
        assert!(
            output.status.success(),
            "pkcs11-tool {args:?} failed: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        for path in &self.read_write {
            give_away(path);
        }
    }

    /// A host with the token open, which behaves as told.
    pub(crate) fn host(&self, manners: &str) -> Host {
        let mut env = self.env.clone();
        env.push(("MANNERS".to_owned(), manners.to_owned()));
        let module = self.module.display().to_string();
        env.push(("MANNERS_MODULE".to_owned(), module));
        let mut read_only: Vec<&Path> = self.read_only.iter().map(PathBuf::as_path).collect();
        read_only.push(&self.module);
        let read_write: Vec<&Path> = self.read_write.iter().map(PathBuf::as_path).collect();
        let start = Start::isolated(env, &read_only, &read_write);
        Host::open(&start, open_module(shim()))
    }
}

/// The compiled module.
fn shim() -> &'static Path {
    static MODULE: OnceLock<PathBuf> = OnceLock::new();
    MODULE.get_or_init(|| {
        // By rename: another test program may do the same now.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("manners");
        fs::create_dir_all(&folder).expect("folder");
        let new = folder.join(format!("manners.so.{}", std::process::id()));
        let module = folder.join("manners.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manners/module.c");
        let compiled = Command::new("cc")
            .args(["-Wall", "-O1", "-shared", "-fPIC", "-o"])
            .arg(&new)
            .args([source, "-ldl"])
            .status()
            .expect("`cc` is missing: apt-get install gcc libc6-dev");
        assert!(compiled.success(), "the mannered module does not compile");
        fs::rename(&new, &module).expect("rename");
        module
    })
}
