//! Describes the CPU architectures of machines. Every value that depends on the architecture of a machine is
//! here, so the rest of the crate has few conditions on an architecture.

/// An architecture of machines.
#[derive(Debug, PartialEq, Eq)]
pub struct Arch {
    /// The name in Debian's packages.
    pub debian: &'static str,
    /// The target of cargo for the programs of a machine.
    pub target: &'static str,
    pub qemu: &'static str,
    /// The machine type of QEMU.
    pub machine: &'static str,
    /// The CPU that QEMU emulates. The CPU has all features that kernels and checksums use.
    pub emulated_cpu: &'static str,
    /// The first serial port of a machine, for the console.
    pub console: &'static str,
    /// The second serial port of a machine, for frames.
    pub channel: &'static str,
    /// The arguments of QEMU for the second serial port, whose other end has the identifier `channel`.
    pub channel_device: [&'static str; 2],
    /// Words of the kernel command line that show where a kernel hangs.
    pub debug_words: &'static str,
    /// Whether QEMU can send a non-maskable interrupt (NMI), at which the kernel prints its call trace.
    pub has_nmi: bool,
    /// The starts of the lines with vector and floating-point registers in the output of QEMU.
    pub vector_registers: &'static [&'static str],
    /// The program counter in the output of QEMU.
    pub program_counter: &'static str,
}

pub static X86_64: Arch = Arch {
    debian: "amd64",
    target: "x86_64-unknown-linux-gnu",
    qemu: "qemu-system-x86_64",
    machine: "q35",
    emulated_cpu: "max",
    console: "ttyS0",
    channel: "ttyS1",
    channel_device: ["-serial", "chardev:channel"],
    // - earlyprintk prints messages before the console is ready,
    // - unknown_nmi_panic and panic_print print the state of all CPUs at an NMI.
    debug_words: "earlyprintk=ttyS0 unknown_nmi_panic panic_print=0x40",
    has_nmi: true,
    vector_registers: &["FCW=", "FPR", "XMM", "YMM", "ZMM", "Opmask"],
    program_counter: "RIP=",
};

pub static AARCH64: Arch = Arch {
    debian: "arm64",
    target: "aarch64-unknown-linux-gnu",
    qemu: "qemu-system-aarch64",
    machine: "virt",
    // The standard algorithm of pointer authentication halves the speed of an emulated kernel.
    emulated_cpu: "max,pauth-impdef=on",
    console: "ttyAMA0",
    // The second port of the machine type `virt` needs QEMU 9.1.
    channel: "ttyS0",
    channel_device: ["-device", "pci-serial,chardev=channel"],
    // The device tree names the first serial port, which earlycon uses before the console is ready.
    debug_words: "earlycon",
    has_nmi: false,
    vector_registers: &["FPCR=", "Q", "P0", "P1", "FFR", "Z", "ZA"],
    program_counter: " PC=",
};

/// All architectures.
pub static ALL: [&Arch; 2] = [&X86_64, &AARCH64];
