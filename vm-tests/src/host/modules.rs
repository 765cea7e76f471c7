//! Finds the dependencies of kernel modules and the order to load them in.

use crate::programs::{command, output};
use crate::{Context, Error};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of a kernel, from the output of depmod. Names have underscores, as in the kernel, even
/// if the file names have dashes.
#[derive(Debug, Default)]
pub struct Modules {
    modules: HashMap<String, Module>,
    /// Alias names of modules: on some kernels, `crc32c` is an alias of `crc32c_generic`. Aliases with
    /// patterns are left out, because they match devices.
    aliases: HashMap<String, Vec<String>>,
    built_in: HashSet<String>,
}

#[derive(Debug, Default)]
struct Module {
    /// The path below the module directory of the kernel.
    path: PathBuf,
    needs: Vec<String>,
    wants_before: Vec<String>,
    wants_after: Vec<String>,
}

/// The modules to load in this order, and the missing modules.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LoadOrder {
    pub paths: Vec<PathBuf>,
    pub missing: Vec<String>,
}

impl Modules {
    /// Reads the modules in `dir`, which is `…/lib/modules/RELEASE`. Debian's packages do not contain
    /// the output of depmod, and the host must not write to a foreign directory. So depmod prints its
    /// output, and this function reads only modules.builtin itself.
    pub fn of_directory(dir: &Path, release: &str) -> Result<Modules, Error> {
        let base = dir
            .ancestors()
            .nth(3)
            .ok_or_else(|| format!("{} is not lib/modules/RELEASE", dir.display()))?;
        let found =
            output(command("depmod").arg("--show").arg("--basedir").arg(base).arg(release))?;
        let built_in = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        Ok(Self::parse(&String::from_utf8_lossy(&found), &built_in))
    }

    /// Parses the content of modules.dep, modules.softdep and modules.alias, in any order, and
    /// modules.builtin.
    pub fn parse(found: &str, built_in: &str) -> Modules {
        let mut all = Modules {
            built_in: built_in.lines().map(name_of_path).collect(),
            ..Modules::default()
        };
        // A softdep line may precede the line of its module.
        let mut soft = Vec::new();
        for line in found.lines() {
            if let Some((path, needs)) =
                line.split_once(':').filter(|(path, _)| path.contains(".ko"))
            {
                let module = Module {
                    path: path.into(),
                    needs: needs.split_whitespace().map(name_of_path).collect(),
                    ..Module::default()
                };
                all.modules.insert(name_of_path(path), module);
                continue;
            }
            let mut words = line.split_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("alias"), Some(alias), Some(name)) if !alias.contains(['*', '?', '[']) => {
                    all.aliases.entry(normal(alias)).or_default().push(normal(name));
                }
                (Some("softdep"), Some(name), Some(_)) => soft.push((normal(name), line)),
                _ => {}
            }
        }
        for (name, line) in soft {
            let Some(module) = all.modules.get_mut(&name) else {
                continue;
            };
            let mut wants = None;
            for word in line.split_whitespace().skip(2) {
                match word {
                    "pre:" => wants = Some(&mut module.wants_before),
                    "post:" => wants = Some(&mut module.wants_after),
                    word => {
                        if let Some(wants) = &mut wants {
                            wants.push(normal(word));
                        }
                    }
                }
            }
        }
        all
    }

    /// Returns the modules to load for `names`, each after its dependencies.
    pub fn load_order(&self, names: &[&str]) -> LoadOrder {
        let mut order = LoadOrder::default();
        let mut seen = HashSet::new();
        for name in names {
            if !self.visit(&normal(name), &mut seen, &mut order.paths) {
                order.missing.push((*name).to_owned());
            }
        }
        order
    }

    /// Returns false if the name is neither a module nor built in.
    fn visit(&self, name: &str, seen: &mut HashSet<String>, paths: &mut Vec<PathBuf>) -> bool {
        if let Some(module) = self.modules.get(name) {
            if seen.insert(name.to_owned()) {
                for earlier in module.wants_before.iter().chain(&module.needs) {
                    self.visit(earlier, seen, paths);
                }
                paths.push(module.path.clone());
                for later in &module.wants_after {
                    self.visit(later, seen, paths);
                }
            }
            return true;
        }
        if self.built_in.contains(name) {
            return true;
        }
        let Some(providers) = self.aliases.get(name).filter(|_| seen.insert(name.to_owned()))
        else {
            return seen.contains(name);
        };
        // modprobe loads all modules of an alias too: a generic one, and others for some CPUs.
        let found = providers.iter().filter(|provider| self.visit(provider, seen, paths));
        found.count() > 0
    }
}

/// Returns the decompressed module, because some kernels cannot decompress modules.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let what = || format!("cannot read {}", path.display());
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => {
            output(command("gzip").args(["--decompress", "--stdout"]).arg(path)).context(what)
        }
        Some("xz") => {
            output(command("xz").args(["--decompress", "--stdout"]).arg(path)).context(what)
        }
        Some("zst") => {
            output(command("zstd").args(["--decompress", "--stdout", "--quiet"]).arg(path))
                .context(what)
        }
        Some("ko") => fs::read(path).context(what),
        _ => Err(format!("cannot read {}: unknown compression", path.display()).into()),
    }
}

/// Returns the module name of a path: `nls_iso8859_1` for `kernel/fs/nls/nls_iso8859-1.ko.xz`.
fn name_of_path(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FOUND: &str = "\
# The softdep line precedes the line of its module.
softdep btrfs pre: sha256 crypto-crc32c post: later
kernel/fs/btrfs/btrfs.ko.xz: kernel/lib/raid6_pq.ko.xz kernel/crypto/xor.ko.xz
kernel/lib/raid6_pq.ko.xz:
kernel/crypto/xor.ko.xz: kernel/lib/raid6_pq.ko.xz
kernel/lib/later.ko:
kernel/arch/crc32c-intel.ko.zst:
kernel/crypto/sha256_generic.ko:
alias crypto-crc32c crc32c_intel
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias sha256 sha256_generic
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
";

    fn order(names: &[&str]) -> (Vec<String>, Vec<String>) {
        let modules = Modules::parse(FOUND, "kernel/fs/ext4/ext4.ko\n");
        let order = modules.load_order(names);
        let names = order.paths.iter().map(|path| name_of_path(path.to_str().unwrap())).collect();
        (names, order.missing)
    }

    #[test]
    fn load_order_keeps_dependencies_first() {
        let (loaded, missing) = order(&["btrfs", "xor"]);
        assert_eq!(loaded, ["sha256_generic", "crc32c_intel", "raid6_pq", "xor", "btrfs", "later"]);
        assert!(missing.is_empty());
    }

    #[test]
    fn built_in_module_is_not_reported_missing() {
        assert_eq!(order(&["ext4"]), (vec![], vec![]));
        assert_eq!(order(&["none-such"]), (vec![], vec!["none-such".to_owned()]));
    }

    #[test]
    fn dash_and_underscore_return_same_module() {
        assert_eq!(order(&["crc32c_intel"]), order(&["crc32c-intel"]));
    }

    #[test]
    fn cyclic_dependencies_return_each_module_once() {
        assert_eq!(order(&["a"]).0, ["b", "a"]);
    }

    #[test]
    fn module_of_any_compression_returns_content() {
        let dir = std::env::temp_dir().join(format!("vm-tests-modules-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let plain = dir.join("module.ko");
        fs::write(&plain, b"\x7fELF").unwrap();
        for (program, suffix) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
            output(command(program).arg("--keep").arg("--quiet").arg(&plain)).unwrap();
            let compressed = dir.join(format!("module.ko.{suffix}"));
            assert_eq!(read(&compressed).unwrap(), b"\x7fELF");
        }
        assert_eq!(read(&plain).unwrap(), b"\x7fELF");
        fs::rename(&plain, dir.join("module.ko.br")).unwrap();
        assert!(read(&dir.join("module.ko.br")).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }

    proptest! {
        #[test]
        fn arbitrary_module_list_never_panics(found: String, built_in: String, name: String) {
            Modules::parse(&found, &built_in).load_order(&[&name]);
            Modules::parse(&format!("softdep {found}\n{found}.ko: x"), &built_in).load_order(&[&name]);
        }
    }
}
