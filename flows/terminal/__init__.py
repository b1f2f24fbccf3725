"""Terminal: tables, trees and progress bars for people. Everything that rich draws."""
