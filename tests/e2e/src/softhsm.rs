//! A SoftHSM token with a key-encryption key, as the written procedure makes it.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::HOST_UID;
use crate::workbench::{Workbench, run_with};

/// Debian's module.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// Label of the token, from the written procedure.
pub const TOKEN: &str = "rciis-production";
/// Label of the key-encryption key, from the written procedure.
pub const KEK: &str = "k8s-secrets-kek";

/// A token that only hsm-token's user can reach.
pub struct SoftHsm {
    name: String,
    folder: PathBuf,
    /// What `SOFTHSM2_CONF` names.
    pub conf: PathBuf,
    /// The user PIN, in a file that only root reads.
    pub pin_file: PathBuf,
    pin: String,
}

impl SoftHsm {
    /// Initialises the token and generates the KEK on it: 256 bits, sensitive, never extractable.
    pub fn create(bench: &Workbench) -> Result<Self> {
        Self::create_named(bench, "main")
    }

    /// As [`Self::create`], for one of several tokens. All have the same label, and a key of their own
    /// under the same label.
    pub fn create_named(bench: &Workbench, name: &str) -> Result<Self> {
        let token = Self::folder_for(bench, name)?;
        run_with(token.tool("softhsm2-util").args([
            "--init-token",
            "--free",
            "--label",
            TOKEN,
            "--so-pin",
            "so-pin-5678",
            "--pin",
            &token.pin,
        ]))
        .context("cannot initialise a SoftHSM token")?;
        token.generate_key(KEK, "01")?;
        Ok(token)
    }

    /// A second token with the same keys, as an HSM's clone or restored backup is one.
    pub fn clone_named(&self, bench: &Workbench, name: &str) -> Result<Self> {
        let clone = Self::folder_for(bench, name)?;
        let from = format!("{}/.", self.tokens().display());
        run_with(Command::new("cp").args(["-a", &from]).arg(clone.tokens()))
            .context("cannot copy the token")?;
        Ok(clone)
    }

    fn folder_for(bench: &Workbench, name: &str) -> Result<Self> {
        let folder = bench.folder(&format!("softhsm-{name}"), HOST_UID)?;
        let tokens = bench.folder(&format!("softhsm-{name}/tokens"), HOST_UID)?;
        let conf = bench.path().join(format!("softhsm2-{name}.conf"));
        fs::write(
            &conf,
            format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                tokens.display()
            ),
        )?;
        let pin = "hsm-demo-pin-1234".to_owned();
        let pin_file = bench.write("pin", &pin, 0)?;
        Ok(Self {
            name: name.to_owned(),
            folder,
            conf,
            pin_file,
            pin,
        })
    }

    /// Its name in configurations.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Generates another key on the token.
    pub fn generate_key(&self, label: &str, id: &str) -> Result<()> {
        run_with(self.tool("pkcs11-tool").args([
            "--module",
            MODULE,
            "--token-label",
            TOKEN,
            "--login",
            "--pin",
            &self.pin,
            "--keygen",
            "--key-type",
            "AES:32",
            "--label",
            label,
            "--id",
            id,
            "--sensitive",
        ]))
        .with_context(|| format!("cannot generate {label}"))?;
        self.give_to_host(&self.tokens())
    }

    /// Takes the token away, as somebody who pulls the network cable of an HSM.
    pub fn take_away(&self) -> Result<()> {
        fs::rename(self.tokens(), self.folder.join("away")).context("cannot take the token away")
    }

    /// Brings it back.
    pub fn bring_back(&self) -> Result<()> {
        fs::rename(self.folder.join("away"), self.tokens()).context("cannot bring the token back")
    }

    /// What hsm-token must be able to write: the folder above the tokens, so that it sees them go.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The user PIN, for looking that it appears nowhere.
    pub fn pin(&self) -> &str {
        &self.pin
    }

    fn tokens(&self) -> PathBuf {
        self.folder.join("tokens")
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SOFTHSM2_CONF", &self.conf);
        command
    }

    fn give_to_host(&self, path: &Path) -> Result<()> {
        chown(path, Some(HOST_UID), Some(HOST_UID))?;
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                self.give_to_host(&entry?.path())?;
            }
        }
        Ok(())
    }
}
