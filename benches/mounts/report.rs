//! All figures, as text.

use std::fmt::Write as _;
use std::fs;

use crate::machine::{MemInfo, cores};
use crate::timing::Samples;

/// A table, in Markdown.
pub struct Table {
    /// The name of its place on the page.
    name: &'static str,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(name: &'static str, header: Vec<&str>) -> Table {
        Table { name, rows: vec![header.into_iter().map(str::to_owned).collect()] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn to_text(&self) -> String {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = match column {
                    0 => write!(text, "| {cell:width$} |"),
                    _ => write!(text, " {cell:>width$} |"),
                };
            }
            text.push('\n');
            if number == 0 {
                text.push_str("|---|");
                text.push_str(&"---:|".repeat(columns - 1));
                text.push('\n');
            }
        }
        text
    }
}

pub struct Report {
    machine: String,
    groups: Vec<(String, Vec<Samples>)>,
    tables: Vec<Table>,
    skipped: Vec<String>,
}

impl Report {
    pub fn new(programs: &[String]) -> Report {
        Report {
            machine: format!("{}\n{}.", machine(), programs.join("; ")),
            groups: Vec::new(),
            tables: Vec::new(),
            skipped: Vec::new(),
        }
    }

    pub fn add(&mut self, group: &str, samples: Vec<Samples>) {
        self.groups.push((group.to_owned(), samples));
    }

    pub fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Prints once why a figure is not measured.
    pub fn skip(&mut self, reason: String) {
        if !self.skipped.contains(&reason) {
            println!("not measured: {reason}");
            self.skipped.push(reason);
        }
    }

    pub fn samples(&self, group: &str, name: &str) -> Option<&Samples> {
        let mut all = self.groups.iter().filter(|(of, _)| of == group).flat_map(|(_, all)| all);
        all.find(|samples| samples.name == name)
    }

    pub fn median(&self, group: &str, name: &str) -> Option<f64> {
        self.samples(group, name).map(Samples::median)
    }

    pub fn to_text(&self) -> String {
        let tables = self.tables.iter().map(|table| format!("\n{}", table.to_text()));
        self.machine.clone() + "\n" + &tables.collect::<String>()
    }

    pub fn to_tsv(&self) -> String {
        let mut text =
            "group\tcase\tmedian\tlower quartile\tupper quartile\tlowest\thighest\trounds\n"
                .to_owned();
        for (group, all) in &self.groups {
            for samples in all {
                let _ = write!(text, "{group}\t{}", samples.name);
                for part in [0.5, 0.25, 0.75, 0.0, 1.0] {
                    let _ = write!(text, "\t{:.3}", samples.quantile(part));
                }
                let _ = writeln!(text, "\t{}", samples.values.len());
            }
        }
        text
    }

    /// Writes the tables into the page, each between two comments with its name.
    pub fn fill_in(&self, page: &str) -> String {
        let machine = ("machine", format!("{}\n", self.machine));
        let tables = self.tables.iter().map(|table| (table.name, table.to_text()));
        let mut page = page.to_owned();
        for (name, text) in tables.chain([machine]) {
            let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
            let parts = page
                .split_once(&begin)
                .and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
            if let Some((before, after)) = parts {
                page = format!("{before}{begin}{text}{end}{after}");
            }
        }
        page
    }
}

fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{}, {} cores, {} GiB of memory; Linux {}; load average before: {}.",
        model.map_or("unknown processor", |(_, model)| model),
        cores(),
        MemInfo::read().get("MemTotal") >> 30,
        rustix::system::uname().release().to_string_lossy(),
        load.split(' ').next().unwrap_or_default(),
    )
}
