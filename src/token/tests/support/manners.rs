//! The module of `tests/manners/module.c`, and the tokens behind it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::slot::Slot;
use tempfile::TempDir;

use super::{Host, KEY_LABEL, LABEL, PIN, SOFTHSM, SoftHsm, Start, give_away, open_module};

/// A software token, seen through the module that imitates others.
pub(crate) struct Mannered {
    module: PathBuf,
    /// Leads into the namespaces that the token lives in.
    enter: Vec<String>,
    slot: Option<&'static str>,
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
            enter: Vec::new(),
            slot: None,
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
            enter: Vec::new(),
            slot: None,
            env: vec![("KRYOPTIC_CONF".to_owned(), conf.display().to_string())],
            read_only: vec![conf],
            read_write: vec![tokens],
            _folder: Box::new(folder),
        };
        this.initialize("7");
        this
    }

    /// openCryptoki's software token with the same. Its daemon and its files are the machine's, so it
    /// gets a machine of its own: mounts, processes and shared memory.
    pub(crate) fn opencryptoki() -> Self {
        let world = World::of_opencryptoki();
        let this = Self {
            // As the linker finds it.
            module: "libopencryptoki.so.0".into(),
            enter: world.enter(),
            slot: Some("3"),
            env: Vec::new(),
            read_only: Vec::new(),
            read_write: Vec::new(),
            _folder: Box::new(world),
        };
        this.initialize("3");
        this
    }

    fn initialize(&self, slot: &str) {
        let so = ["--so-pin", "87654321"];
        let init = ["--init-token", "--slot", slot, "--label", LABEL];
        self.tool(&[&init[..], &so].concat());
        let init = ["--init-pin", "--login", "--login-type", "so"];
        let rest = ["--slot", slot, "--new-pin", PIN];
        self.tool(&[&init[..], &so, &rest].concat());
        self.add("AES:32", KEY_LABEL, "01", &["--sensitive"]);
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
        if let Some(slot) = self.slot {
            args.splice(..2, ["--slot", slot]);
        }
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

    /// The SubjectPublicKeyInfo of a key pair, as `pkcs11-tool` writes it.
    pub(crate) fn public_key(&self, label: &str) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let path = file.path().to_str().expect("a path in UTF-8");
        let which = ["--type", "pubkey", "--label", label, "--output-file", path];
        let token = ["--token-label", LABEL, "--read-object"];
        self.tool(&[&token[..], &which].concat());
        fs::read(path).expect("the public key")
    }

    /// The real module in this process, and the token's slot: the bare limit of a measurement.
    pub(crate) fn open_here(&self) -> (Pkcs11, Slot) {
        for (name, value) in &self.env {
            // SAFETY: a measurement has one thread, and none that reads the environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
        let module = Pkcs11::new(&self.module).expect("module");
        let flags = CInitializeFlags::OS_LOCKING_OK;
        let initialized = module.initialize(CInitializeArgs::new(flags));
        initialized.expect("initialize");
        let slots = module.get_slots_with_initialized_token().expect("slots");
        (module, slots[0])
    }

    fn tool(&self, args: &[&str]) {
        let mut command = match self.enter.split_first() {
            None => Command::new("pkcs11-tool"),
            Some((program, options)) => {
                let mut command = Command::new(program);
                command.args(options).arg("pkcs11-tool");
                command
            }
        };
        let output = command
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
        if !self.enter.is_empty() {
            let start = Start {
                loader: self.enter.clone(),
                ..Start::plain(env)
            };
            return Host::open(&start, open_module(shim()));
        }
        let mut read_only: Vec<&Path> = self.read_only.iter().map(PathBuf::as_path).collect();
        read_only.push(&self.module);
        let read_write: Vec<&Path> = self.read_write.iter().map(PathBuf::as_path).collect();
        let start = Start::isolated(env, &read_only, &read_write);
        Host::open(&start, open_module(shim()))
    }
}

/// Namespaces in which a daemon runs that cannot be told to keep its files elsewhere.
struct World(Child);

impl World {
    fn of_opencryptoki() -> Self {
        // Fresh copies of what the package installed; the daemon answers on a socket in /run.
        const SCRIPT: &str = "set -e
            command -v pkcsslotd >/dev/null || { echo 'pkcsslotd is missing: apt-get install opencryptoki'; exit; }
            mount -t tmpfs none /dev/shm
            mount -t tmpfs none /mnt
            cp -a /var/lib/opencryptoki /mnt/lib
            mount -t tmpfs none /run
            mkdir -p /run/lock /run/opencryptoki
            cp -a /mnt/lib /run/lock/opencryptoki
            mount --bind /mnt/lib /var/lib/opencryptoki
            pkcsslotd
            echo ready
            exec sleep 600 >/dev/null";
        let mut child = Command::new("unshare")
            .args(["--mount", "--ipc", "--pid", "--fork", "--kill-child", "--"])
            .args(["sh", "-c", SCRIPT])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`unshare` is missing: apt-get install util-linux");
        let mut said = String::new();
        let stdout = child.stdout.take().expect("stdout");
        let read = BufReader::new(stdout).read_line(&mut said);
        let world = Self(child);
        read.expect("what it says");
        assert_eq!(said.trim(), "ready");
        world
    }

    fn enter(&self) -> Vec<String> {
        let ns = format!("/proc/{}/ns", self.0.id());
        vec![
            "nsenter".to_owned(),
            format!("--mount={ns}/mnt"),
            format!("--ipc={ns}/ipc"),
            format!("--pid={ns}/pid_for_children"),
            "--".to_owned(),
        ]
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
