//! The report of a system: lines with a name and a value, from examples/boot-report.

use crate::Error;

/// The line at the end of a report.
const END: &str = "report: complete";

/// The report of one start of the programs of a system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    lines: Vec<(String, String)>,
}

impl Report {
    /// Parses the reports of one boot. A soft reboot adds a report.
    pub fn parse_all(text: &str) -> Vec<Report> {
        let mut reports = Vec::new();
        let mut report = Report::default();
        for line in text.lines() {
            if line == END {
                reports.push(std::mem::take(&mut report));
            } else if let Some((name, value)) = line.split_once(':') {
                report.lines.push((name.to_owned(), value.trim().to_owned()));
            }
        }
        reports
    }

    /// Returns all values of a name.
    pub fn all<'a>(&'a self, name: &str) -> Vec<&'a str> {
        let values = self.lines.iter().filter(|(other, _)| other == name);
        values.map(|(_, value)| value.as_str()).collect()
    }

    /// Returns the first value of a name.
    pub fn get(&self, name: &str) -> Result<&str, Error> {
        let value = self.lines.iter().find(|(other, _)| other == name);
        value
            .map(|(_, value)| value.as_str())
            .ok_or_else(|| format!("the report has no line {name:?}").into())
    }

    /// Checks for a value.
    pub fn expect(&self, name: &str, expected: &str) -> Result<(), Error> {
        let found = self.get(name)?;
        match found == expected {
            true => Ok(()),
            false => Err(format!("{name}: {found:?}, expected {expected:?}").into()),
        }
    }

    /// Checks that a value contains each of these texts.
    pub fn expect_parts(&self, name: &str, parts: &[&str]) -> Result<(), Error> {
        let found = self.get(name)?;
        match parts.iter().find(|part| !found.contains(**part)) {
            None => Ok(()),
            Some(part) => Err(format!("{name}: {found:?}, expected {part:?} in it").into()),
        }
    }

    /// Returns the number at the start of a value.
    pub fn number(&self, name: &str) -> Result<u64, Error> {
        leading_number(self.get(name)?)
    }

    /// Returns the numbers at the starts of all values of a name.
    pub fn numbers(&self, name: &str) -> Result<Vec<u64>, Error> {
        self.all(name).into_iter().map(leading_number).collect()
    }
}

fn leading_number(value: &str) -> Result<u64, Error> {
    let number = value.split_whitespace().next().unwrap_or_default();
    number.parse().map_err(|_| format!("{value:?} does not start with a number").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_reboot_adds_a_report() {
        let text = "state: running\nfailed units: \nreport: complete\nstate: degraded\n\
                    report: complete\nstate: incomplete\n";
        let reports = Report::parse_all(text);
        assert_eq!(reports.len(), 2);
        reports[0].expect("state", "running").unwrap();
        reports[0].expect("failed units", "").unwrap();
        let message = reports[1].expect("state", "running").unwrap_err().to_string();
        assert_eq!(message, "state: \"degraded\", expected \"running\"");
    }

    #[test]
    fn values_keep_their_colons_and_numbers() {
        let text = "mount /: composefs:12 overlay\nmemory Shmem: 5 kB\ntime: 3 us\ntime: 1 us\n\
                    time: 9 us\nreport: complete\n";
        let report = &Report::parse_all(text)[0];
        report.expect("mount /", "composefs:12 overlay").unwrap();
        report.expect_parts("mount /", &["overlay", "12"]).unwrap();
        assert!(report.expect_parts("mount /", &["ext4"]).is_err());
        assert_eq!(report.number("memory Shmem").unwrap(), 5);
        assert_eq!(report.numbers("time").unwrap(), [3, 1, 9]);
        assert!(report.numbers("mount /").is_err());
        assert!(report.get("missing").is_err());
    }
}
